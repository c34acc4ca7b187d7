"""Attention as the modules of torch.nn write it."""

from __future__ import annotations

import torch
from torch import nn
from zoo_entry import Call, Entry, Rewritten


def _encoder() -> Call:
    layer = nn.TransformerEncoderLayer(128, 4, 192, batch_first=True)
    return Call(nn.TransformerEncoder(layer, 2), (torch.randn(2, 300, 128),), {})


def _transformer() -> Call:
    module = nn.Transformer(128, 4, 2, 2, 192, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(200)
    inputs = (torch.randn(1, 300, 128), torch.randn(1, 200, 128))
    return Call(module, inputs, {"tgt_mask": mask, "tgt_is_causal": True})


def _multihead() -> Call:
    query, context = torch.randn(1, 200, 128), torch.randn(1, 300, 128)
    module = nn.MultiheadAttention(128, 4, batch_first=True)
    return Call(module, (query, context, context), {"need_weights": False})


TORCH = [
    Entry("transformer-encoder", _encoder, (Rewritten("layers.?", 2, pattern="mha"),)),
    Entry(
        "transformer",
        _transformer,
        (
            Rewritten("encoder.layers.?", 2, pattern="mha"),
            Rewritten("decoder.layers.?.self_attn", 2, "causal", "mha"),
            Rewritten("decoder.layers.?.multihead_attn", 2, pattern="mha"),
        ),
    ),
    Entry("multihead-attention", _multihead, (Rewritten("MultiheadAttention", 1, pattern="mha"),)),
]
