"""Models of transformers and diffusers, small and with random weights, and what the backend finds in each.

A tile is 128 queries x 64 keys: 200 to 400 tokens are several tiles and end in a ragged one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zoo_entry import Call, Dense, Entry, Rewritten

DATA = "the mask depends on data"
WINDOW = "a sliding window"


def _tokens(batch: int, length: int, vocabulary: int = 256) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length))


def _padding(*lengths: int, to: int) -> Tensor:
    """An attention_mask of transformers: 1 for a token, 0 for padding behind it."""
    return (torch.arange(to) < torch.tensor(lengths)[:, None]).long()


def llama(tokens: int = 300, **inputs: Any) -> Call:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return Call(LlamaForCausalLM(config), (), {"input_ids": _tokens(2, tokens), **inputs})


def _llama_with_padding() -> Call:
    return llama(attention_mask=_padding(220, 100, to=300))


def _gemma3() -> Call:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=512,
    )
    return Call(Gemma3ForCausalLM(config), (), {"input_ids": _tokens(1, 300)})


def _bert(**inputs: Any) -> Call:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=512,
    )
    return Call(BertModel(config), (), {"input_ids": _tokens(2, 300), **inputs})


def _bert_with_padding() -> Call:
    return _bert(attention_mask=_padding(220, 100, to=300))


def _vit() -> Call:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=128,
        patch_size=8,
    )
    return Call(ViTModel(config), (torch.randn(2, 3, 128, 128),), {})


def _whisper() -> Call:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=256,
        num_mel_bins=16,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        max_source_positions=300,
        max_target_positions=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    inputs = {"input_features": torch.randn(1, 16, 600), "decoder_input_ids": _tokens(1, 200)}
    return Call(WhisperModel(config), (), inputs)


def _t5() -> Call:
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=256,
        d_model=128,
        d_kv=32,
        d_ff=192,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
    )
    return Call(T5Model(config), (), {"input_ids": _tokens(1, 300), "decoder_input_ids": _tokens(1, 200)})


def _flux() -> Call:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    text, height, width = 40, 16, 16
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, height * width, 16),
        "encoder_hidden_states": torch.randn(1, text, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float(),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }
    return Call(model, (), inputs)


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


def _unet() -> Call:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=20,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    inputs = {
        "sample": torch.randn(1, 4, 20, 20),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, 32),
        "return_dict": False,
    }
    return Call(model, (), inputs)


ZOO = [
    Entry("llama", llama, (Rewritten("model.layers.?.self_attn", 2, is_causal=True),)),
    Entry("llama-padded", _llama_with_padding, (Dense("model.layers.?.self_attn", 2, DATA),)),
    Entry(
        "gemma3",
        _gemma3,
        (
            Rewritten("model.layers.[13].self_attn", 2, is_causal=True),
            Dense("model.layers.[02].self_attn", 2, WINDOW),
        ),
    ),
    Entry("bert", _bert, (Rewritten("encoder.layer.?.attention.self", 2),)),
    Entry("bert-padded", _bert_with_padding, (Dense("encoder.layer.?.attention.self", 2, DATA),)),
    Entry("vit", _vit, (Rewritten("layers.?.attention", 2),)),
    Entry(
        "whisper",
        _whisper,
        (
            Rewritten("encoder.layers.?.self_attn", 2),
            Rewritten("decoder.layers.?.self_attn", 2, is_causal=True),
            Rewritten("decoder.layers.?.encoder_attn", 2),
        ),
    ),
    # T5 adds a learned position bias to the scores of self-attention: a mask that depends on weights.
    Entry(
        "t5",
        _t5,
        (
            Dense("encoder.block.?.layer.0.SelfAttention", 2, DATA),
            Dense("decoder.block.?.layer.0.SelfAttention", 2, DATA),
            Rewritten("decoder.block.?.layer.1.EncDecAttention", 2),
        ),
        gain=1.5 * 32**-0.25,  # T5 does not divide its scores by sqrt(head_dim)
    ),
    Entry("flux", _flux, (Rewritten("transformer_blocks.0.attn", 1), Rewritten("single_transformer_blocks.?.attn", 2))),
    Entry("wan", _wan, (Rewritten("blocks.?.attn1", 2), Rewritten("blocks.?.attn2", 2))),
    Entry("cogvideox", _cogvideox, (Rewritten("transformer_blocks.?.attn1", 2),), gain=2.5),
    Entry(
        "unet",
        _unet,
        tuple(
            Rewritten(f"{block}.attentions.*.transformer_blocks.0.{kind}", count)
            for block, count in (("down_blocks.0", 1), ("mid_block", 1), ("up_blocks.0", 2))
            for kind in ("attn1", "attn2")
        ),
    ),
]
