"""Models of speech: convolutions in front, relative positions of every kind."""

from __future__ import annotations

from typing import Any

import torch
from zoo_entry import SMALL, Call, Entry, Rewritten, from_transformers, tokens

# Two convolutions in place of seven: a frame every 10 samples.
WAVES = {
    **SMALL,
    "conv_dim": [32, 32],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _whisper(**fields: Any) -> Call:
    sizes = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in _SIDE.items()}
    config = {
        "vocab_size": 256,
        "num_mel_bins": 16,
        "d_model": 128,
        "max_source_positions": 300,
        "max_target_positions": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "decoder_start_token_id": 2,
    }
    inputs = {"input_features": torch.randn(1, 16, 600), "decoder_input_ids": tokens(1, 200)}
    return from_transformers("WhisperModel", {**config, **sizes, **fields}, **inputs)


_SIDE = {"layers": 1, "attention_heads": 4, "ffn_dim": 192}


def _wave(model: str, **fields: Any) -> Call:
    return from_transformers(model, {**WAVES, **fields}, input_values=torch.randn(1, 3000))


def _wav2vec2() -> Call:
    return _wave("Wav2Vec2Model")


def _wavlm() -> Call:
    return _wave("WavLMModel")


def _conformer() -> Call:
    return _wave("Wav2Vec2ConformerModel", position_embeddings_type="relative", conv_depthwise_kernel_size=7)


def _speecht5() -> Call:
    sizes = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in _SIDE.items()}
    config = {**WAVES, **sizes, "vocab_size": 81}
    del config["num_hidden_layers"], config["num_attention_heads"], config["intermediate_size"]
    inputs = {"input_values": torch.randn(1, 3000), "decoder_input_ids": tokens(1, 200, 81)}
    return from_transformers("SpeechT5ForSpeechToText", config, **inputs)


SPEECH = [
    Entry(
        "whisper",
        _whisper,
        (
            Rewritten("encoder.layers.?.self_attn", 1),
            Rewritten("decoder.layers.?.self_attn", 1, mask="causal"),
            Rewritten("decoder.layers.?.encoder_attn", 1),
        ),
    ),
    Entry(
        "whisper-eager",
        lambda: _whisper(attn_implementation="eager"),
        (
            Rewritten("encoder.layers.?.self_attn", 1, pattern="softmax"),
            Rewritten("decoder.layers.?.self_attn", 1, "causal", "softmax"),
            Rewritten("decoder.layers.?.encoder_attn", 1, pattern="softmax"),
        ),
    ),
    Entry("wav2vec2", _wav2vec2, (Rewritten("encoder.layers.?.attention", 2),)),
    # Each query's own gate weighs a learned position bias.
    Entry("wavlm", _wavlm, (Rewritten("encoder.layers.?.attention", 2, "given", "mha"),)),
    Entry("wav2vec2-conformer", _conformer, (Rewritten("encoder.layers.?.self_attn", 2, mask="given"),)),
    Entry(
        "speecht5",
        _speecht5,
        (
            Rewritten("speecht5.encoder.wrapped_encoder.layers.?.attention", 1, "given", pattern="softmax"),
            Rewritten("speecht5.decoder.wrapped_decoder.layers.?.self_attn", 1, "causal", "softmax"),
            Rewritten("speecht5.decoder.wrapped_decoder.layers.?.encoder_attn", 1, pattern="softmax"),
        ),
    ),
]
