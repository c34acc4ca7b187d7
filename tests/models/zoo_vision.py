"""Models that look: patches, windows, object queries, two towers."""

from __future__ import annotations

from typing import Any

import torch
from zoo_entry import SMALL, Call, Entry, Rewritten, from_transformers, tokens

PATCHES = {"image_size": 128, "patch_size": 8}  # 256 of them


def _image(size: int = 128, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def _vit(batch: int = 2, **fields: Any) -> Call:
    return from_transformers("ViTModel", {**SMALL, **PATCHES, **fields}, pixel_values=_image(batch=batch))


def _beit() -> Call:
    config = {**SMALL, **PATCHES, "use_relative_position_bias": True, "layer_scale_init_value": 1.0}
    return from_transformers("BeitModel", config, pixel_values=_image())


def _swin() -> Call:
    config = {"image_size": 64, "patch_size": 2, "embed_dim": 64, "depths": [2], "num_heads": [4], "window_size": 16}
    return from_transformers("SwinModel", config, pixel_values=_image(64))


def _segformer() -> Call:
    config = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [32, 64],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    }
    return from_transformers("SegformerModel", config, pixel_values=_image(96))


def _sam() -> Call:
    config = {**SMALL, "image_size": 128, "patch_size": 8, "window_size": 12, "global_attn_indexes": [1]}
    return from_transformers(
        "SamVisionModel", {**config, "output_channels": 32, "num_pos_feats": 16}, pixel_values=_image()
    )


def _clip() -> Call:
    text = {**SMALL, "max_position_embeddings": 160, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**SMALL, **PATCHES}
    config = {"text_config": text, "vision_config": vision, "projection_dim": 64}
    return from_transformers("CLIPModel", config, input_ids=tokens(1, 150), pixel_values=_image())


def _siglip() -> Call:
    return from_transformers("SiglipVisionModel", {**SMALL, **PATCHES}, pixel_values=_image())


def _detr() -> Call:
    from transformers import ResNetConfig

    sizes = {"layers": 1, "attention_heads": 4, "ffn_dim": 192}
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in sizes.items()}
    config = {**config, "d_model": 128, "num_queries": 140, "backbone_config": backbone}
    return from_transformers("DetrModel", config, pixel_values=_image())


def _timesformer() -> Call:
    config = {**SMALL, "image_size": 96, "patch_size": 8, "num_frames": 3}
    return from_transformers("TimesformerModel", config, pixel_values=torch.randn(1, 3, 3, 96, 96))


def _perceiver() -> Call:
    config = {"num_latents": 140, "d_latents": 128, "d_model": 64, "num_self_attends_per_block": 2}
    heads = {"num_self_attention_heads": 4, "num_cross_attention_heads": 4}
    return from_transformers("PerceiverModel", {**config, **heads}, inputs=torch.randn(1, 300, 64))


def _qwen2_vl() -> Call:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = {"depth": 2, "embed_dim": 128, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    patches = 12 * 12 + 14 * 10
    inputs = {
        "hidden_states": torch.randn(patches, 3 * 2 * 8 * 8),
        "grid_thw": torch.tensor([[1, 12, 12], [1, 14, 10]]),
    }
    return Call(Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**config)), (), inputs)


VISION = [
    Entry("vit", _vit, (Rewritten("layers.?.attention", 2),)),
    Entry(
        "vit-eager",
        lambda: _vit(1, attn_implementation="eager"),
        (Rewritten("layers.?.attention", 2, pattern="softmax"),),
    ),
    Entry("beit", _beit, (Rewritten("layers.?.attention", 2, mask="given"),)),
    Entry("swin", _swin, (Rewritten("encoder.layers.0.blocks.?.attention", 2, mask="given"),)),
    Entry("segformer", _segformer, (Rewritten("stages.?.blocks.0.attention", 2),)),
    Entry("sam", _sam, (Rewritten("vision_encoder.layers.?.attn", 2, mask="given"),)),
    Entry(
        "clip",
        _clip,
        (
            Rewritten("vision_model.encoder.layers.?.self_attn", 2),
            Rewritten("text_model.encoder.layers.?.self_attn", 2, mask="causal"),
        ),
    ),
    Entry(
        "siglip",
        _siglip,
        (Rewritten("encoder.layers.?.self_attn", 2), Rewritten("head.attention", 1, pattern="mha")),
    ),
    Entry(
        "detr",
        _detr,
        (
            Rewritten("encoder.layers.?.self_attn", 1, mask="given"),
            Rewritten("decoder.layers.?.self_attn", 1),
            Rewritten("decoder.layers.?.encoder_attn", 1, mask="given"),
        ),
    ),
    Entry(
        "timesformer",
        _timesformer,
        (
            Rewritten("encoder.layer.?.temporal_attention.attention", 2, pattern="softmax"),
            Rewritten("encoder.layer.?.attention.attention", 2, pattern="softmax"),
        ),
    ),
    Entry(
        "perceiver",
        _perceiver,
        (
            Rewritten("encoder.cross_attention.attention.self", 1, pattern="softmax"),
            Rewritten("encoder.self_attends.?.attention.self", 2, pattern="softmax"),
        ),
    ),
    Entry("qwen2-vl", _qwen2_vl, (Rewritten("blocks.?.attn:[12]", 4),)),  # a call for each of two images
]
