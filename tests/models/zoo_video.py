"""Diffusion models of video and sound: long joint sequences, attention in space and in time."""

from __future__ import annotations

import torch
from zoo_entry import Call, Dense, Entry, Rewritten, from_diffusers, padding

HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}


def _wan() -> Call:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=192,
        num_layers=2,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 20, 20),  # 3 x 10 x 10 tokens
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 80, 32),
        "return_dict": False,
    }
    return Call(model, (), inputs)


def _cogvideox() -> Call:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=2,
        sample_width=20,
        sample_height=20,
        sample_frames=9,
        max_text_seq_length=30,
    )
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 20, 20),  # 3 x 10 x 10 tokens, joined with the text's 30
        "encoder_hidden_states": torch.randn(1, 30, 32),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    return Call(model, (), inputs)


def _hunyuan_video() -> Call:
    config = {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 32,
        "rope_axes_dim": (8, 12, 12),
    }
    return from_diffusers(
        "HunyuanVideoTransformer3DModel",
        config,
        hidden_states=torch.randn(1, 4, 3, 20, 20),
        timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 120, 32),
        encoder_attention_mask=padding(20, to=120).bool(),
        pooled_projections=torch.randn(1, 32),
        guidance=torch.tensor([1000.0]),
    )


def _ltx_video() -> Call:
    config = {
        **HEADS,
        "in_channels": 16,
        "out_channels": 16,
        "cross_attention_dim": 128,
        "num_layers": 2,
        "caption_channels": 32,
    }
    return from_diffusers(
        "LTXVideoTransformer3DModel",
        config,
        hidden_states=torch.randn(1, 300, 16),
        encoder_hidden_states=torch.randn(1, 80, 32),
        timestep=torch.tensor([500]),
        encoder_attention_mask=padding(60, to=80),
        num_frames=3,
        height=10,
        width=10,
    )


def _mochi() -> Call:
    config = {
        **HEADS,
        "num_layers": 2,
        "pooled_projection_dim": 32,
        "in_channels": 4,
        "text_embed_dim": 32,
        "time_embed_dim": 16,
        "max_sequence_length": 40,
    }
    return from_diffusers(
        "MochiTransformer3DModel",
        config,
        hidden_states=torch.randn(1, 4, 3, 20, 20),
        encoder_hidden_states=torch.randn(1, 40, 32),
        timestep=torch.tensor([500]),
        encoder_attention_mask=padding(30, to=40).bool(),
    )


def _latte() -> Call:
    config = {
        **HEADS,
        "in_channels": 4,
        "num_layers": 1,
        "cross_attention_dim": 128,
        "sample_size": 24,
        "patch_size": 2,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "num_embeds_ada_norm": 100,
        "caption_channels": 32,
        "video_length": 3,
    }
    return from_diffusers(
        "LatteTransformer3DModel",
        config,
        hidden_states=torch.randn(1, 4, 3, 24, 24),
        timestep=torch.tensor([50]),
        encoder_hidden_states=torch.randn(1, 80, 32),
    )


def _stable_audio() -> Call:
    config = {
        **HEADS,
        "sample_size": 256,
        "in_channels": 16,
        "num_layers": 2,
        "num_key_value_attention_heads": 2,
        "out_channels": 16,
        "cross_attention_dim": 64,
        "time_proj_dim": 16,
        "global_states_input_dim": 32,
        "cross_attention_input_dim": 32,
    }
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return from_diffusers(
        "StableAudioDiTModel",
        config,
        hidden_states=torch.randn(1, 16, 256),
        timestep=torch.tensor([0.5]),
        encoder_hidden_states=torch.randn(1, 80, 32),
        global_hidden_states=torch.randn(1, 1, 32),
        rotary_embedding=get_1d_rotary_pos_embed(16, 257, use_real=True, repeat_interleave_real=False),
    )


VIDEO = [
    Entry("wan", _wan, (Rewritten("blocks.?.attn1", 2), Rewritten("blocks.?.attn2", 2))),
    Entry("cogvideox", _cogvideox, (Rewritten("transformer_blocks.?.attn1", 2),), gain=2.5),
    Entry(
        "hunyuan-video",
        _hunyuan_video,
        (
            Rewritten("context_embedder.token_refiner.refiner_blocks.0.attn", 1, mask="given"),
            Rewritten("*transformer_blocks.0.attn", 2, mask="given"),
        ),
    ),
    Entry("ltx-video", _ltx_video, (Rewritten("transformer_blocks.?.attn1", 2), Rewritten("*.attn2", 2, mask="given"))),
    # It picks each prompt's valid tokens by torch.nonzero, whose size is data: TorchDynamo breaks the graph there.
    Entry(
        "mochi",
        _mochi,
        (
            Rewritten("time_embed.pooler", 1, mask="given"),
            Dense("transformer_blocks.?.attn1", 2, "outside every compiled graph"),
        ),
    ),
    Entry(
        "latte",
        _latte,
        (Rewritten("transformer_blocks.0.attn?", 2), Rewritten("temporal_transformer_blocks.0.attn1", 1)),
    ),
    Entry("stable-audio", _stable_audio, (Rewritten("transformer_blocks.?.attn?", 4),)),
]
