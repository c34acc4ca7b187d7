"""Diffusion models of images: joint streams, cross-attention, and attention in autoencoders."""

from __future__ import annotations

import torch
from zoo_entry import Call, Entry, Rewritten, from_diffusers, padding

HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}


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


def _unet_eager() -> Call:
    from diffusers.models.attention_processor import AttnProcessor

    call = _unet()
    call.module.set_attn_processor(AttnProcessor())
    return call


def _sd3() -> Call:
    config = {
        **HEADS,
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 32,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return from_diffusers(
        "SD3Transformer2DModel",
        config,
        hidden_states=torch.randn(1, 4, 32, 32),
        encoder_hidden_states=torch.randn(1, 40, 32),
        pooled_projections=torch.randn(1, 32),
        timestep=torch.tensor([500]),
    )


def _pixart() -> Call:
    config = {
        **HEADS,
        "sample_size": 32,
        "in_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 128,
        "caption_channels": 32,
        "norm_num_groups": 1,
        "use_additional_conditions": False,
    }
    return from_diffusers(
        "PixArtTransformer2DModel",
        config,
        hidden_states=torch.randn(1, 4, 32, 32),
        encoder_hidden_states=torch.randn(1, 80, 32),
        encoder_attention_mask=padding(60, to=80),
        timestep=torch.tensor([500]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def _sana() -> Call:
    config = {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 128,
        "caption_channels": 32,
        "sample_size": 16,
    }
    return from_diffusers(
        "SanaTransformer2DModel",
        config,
        hidden_states=torch.randn(1, 4, 16, 16),
        encoder_hidden_states=torch.randn(1, 80, 32),
        timestep=torch.tensor([500]),
    )


def _lumina2() -> Call:
    config = {
        "sample_size": 32,
        "in_channels": 4,
        "hidden_size": 128,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "axes_dim_rope": (8, 12, 12),
        "axes_lens": (160, 64, 64),
        "cap_feat_dim": 32,
    }
    return from_diffusers(
        "Lumina2Transformer2DModel",
        config,
        hidden_states=torch.randn(2, 4, 20, 20),
        encoder_hidden_states=torch.randn(2, 120, 32),
        encoder_attention_mask=padding(120, 10, to=120),
        timestep=torch.tensor([0.5, 0.5]),
    )


def _qwen_image() -> Call:
    config = {
        **HEADS,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (8, 12, 12),
    }
    return from_diffusers(
        "QwenImageTransformer2DModel",
        config,
        hidden_states=torch.randn(1, 256, 16),
        encoder_hidden_states=torch.randn(1, 120, 32),
        encoder_hidden_states_mask=padding(20, to=120),
        timestep=torch.tensor([0.5]),
        img_shapes=[(1, 16, 16)],
    )


def _stable_cascade() -> Call:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "timestep_ratio_embedding_dim": 16,
        "conditioning_dim": 32,
        "block_out_channels": (64, 64),
        "num_attention_heads": (4, 4),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "clip_text_pooled_in_channels": 32,
        "clip_text_in_channels": 32,
        "clip_image_in_channels": 32,
        "switch_level": (False,),
    }
    return from_diffusers(
        "StableCascadeUNet",
        config,
        sample=torch.randn(1, 4, 16, 16),
        timestep_ratio=torch.tensor([0.5]),
        clip_text_pooled=torch.randn(1, 1, 32),
        clip_text=torch.randn(1, 77, 32),
        clip_img=torch.randn(1, 1, 32),
    )


def _autoencoder() -> Call:
    config = {"block_out_channels": (32, 64), "norm_num_groups": 16, "layers_per_block": 1, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return from_diffusers("AutoencoderKL", {**config, **blocks}, sample=torch.randn(1, 3, 32, 32))


HAND = "attention written out"
_UNET = tuple(
    f"{block}.attentions.{number}.transformer_blocks.0.attn?"
    for block, number in (("down_blocks.0", 0), ("mid_block", 0), ("up_blocks.0", 0), ("up_blocks.0", 1))
)

DIFFUSION = [
    Entry("flux", _flux, (Rewritten("transformer_blocks.0.attn", 1), Rewritten("single_transformer_blocks.?.attn", 2))),
    Entry("unet", _unet, tuple(Rewritten(sites, 2) for sites in _UNET)),
    Entry("unet-eager", _unet_eager, tuple(Rewritten(sites, 2, pattern="softmax") for sites in _UNET)),
    Entry("sd3", _sd3, (Rewritten("transformer_blocks.?.attn", 2), Rewritten("transformer_blocks.0.attn2", 1))),
    Entry(
        "pixart",
        _pixart,
        (Rewritten("transformer_blocks.?.attn1", 2), Rewritten("transformer_blocks.?.attn2", 2, mask="given")),
    ),
    # Its self-attention is linear: no softmax, no map of scores.
    Entry("sana", _sana, (Rewritten("transformer_blocks.?.attn2", 2),)),
    Entry(
        "lumina2",
        _lumina2,
        (
            Rewritten("context_refiner.0.attn", 1, mask="given"),
            Rewritten("noise_refiner.0.attn", 1),
            Rewritten("layers.?.attn", 2, mask="given"),
        ),
    ),
    Entry("qwen-image", _qwen_image, (Rewritten("transformer_blocks.?.attn", 2, mask="given"),), gain=2.5),
    Entry("stable-cascade", _stable_cascade, (Rewritten("*_blocks.?.2.attention", 4),)),
    Entry("autoencoder-kl", _autoencoder, (Rewritten("*coder.mid_block.attentions.0", 2),)),
]
