"""Encoders of text, and encoders with a decoder: bidirectional masks, position biases, attention in chunks."""

from __future__ import annotations

from typing import Any

from zoo_entry import SMALL, Call, Dense, Entry, Rewritten, from_transformers, padding, tokens


def _encoder(model: str, **fields: Any) -> Call:
    return from_transformers(model, {**SMALL, "max_position_embeddings": 512, **fields}, input_ids=tokens(1, 300))


def _bert(**inputs: Any) -> Call:
    config = {**SMALL, "max_position_embeddings": 512}
    return from_transformers("BertModel", config, input_ids=tokens(2, 300), **inputs)


def _bert_with_padding() -> Call:
    return _bert(attention_mask=padding(220, 100, to=300))


def _bert_eager() -> Call:
    return _encoder("BertModel", attn_implementation="eager")


def _modernbert() -> Call:
    layers = ["full_attention", "sliding_attention"]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return _encoder("ModernBertModel", local_attention=128, layer_types=layers, **ids)


def _deberta() -> Call:
    return _encoder(
        "DebertaV2Model",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        share_att_key=True,
        position_buckets=64,
        norm_rel_ebd="layer_norm",
    )


def _mpnet() -> Call:
    return _encoder("MPNetModel")


def _xlnet() -> Call:
    config = {"vocab_size": 256, "d_model": 128, "n_layer": 2, "n_head": 4, "d_inner": 192}
    return from_transformers("XLNetModel", config, input_ids=tokens(1, 300))


def _longformer() -> Call:
    return _encoder("LongformerModel", attention_window=64, pad_token_id=1)


def _t5() -> Call:
    config = {"vocab_size": 256, "d_model": 128, "d_kv": 32, "d_ff": 192, "num_layers": 2, "num_decoder_layers": 2}
    inputs = {"input_ids": tokens(1, 300), "decoder_input_ids": tokens(1, 200)}
    return from_transformers("T5Model", {**config, "num_heads": 4}, **inputs)


def _bart() -> Call:
    sizes = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in _BART.items()}
    config = {"vocab_size": 256, "d_model": 128, "max_position_embeddings": 512, **sizes}
    return from_transformers("BartModel", config, input_ids=tokens(1, 300), decoder_input_ids=tokens(1, 200))


_BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 192}


_BERT = "encoder.layer.?.attention.self"
_T5 = (
    Rewritten("encoder.block.?.layer.0.SelfAttention", 2, mask="given"),
    Rewritten("decoder.block.?.layer.0.SelfAttention", 2, mask="given"),
    Rewritten("decoder.block.?.layer.1.EncDecAttention", 2),
)

ENCODERS = [
    Entry("bert", _bert, (Rewritten(_BERT, 2),)),
    Entry("bert-padded", _bert_with_padding, (Rewritten(_BERT, 2, mask="given"),)),
    Entry("bert-eager", _bert_eager, (Rewritten(_BERT, 2, pattern="softmax"),)),
    Entry("modernbert", _modernbert, (Rewritten("layers.0.attn", 1), Rewritten("layers.1.attn", 1, mask="given"))),
    # Scores of content with positions, gathered for each query, are added.
    Entry("deberta-v2", _deberta, (Dense(_BERT, 2, "scores are filled with", "softmax"),)),
    Entry("mpnet", _mpnet, (Rewritten("encoder.layer.?.attention.attn", 2, "given", "softmax"),)),
    Entry("xlnet", _xlnet, (Dense("layer.?.rel_attn", 2, "not a tensor of floats", "softmax"),)),
    # Its scores are chunks of a band, cut out of overlapping products and written in place into another tensor.
    Entry("longformer", _longformer, (Dense(_BERT, 2, "no product of queries and keys", "softmax"),)),
    # A learned position bias, a mask of floats, is added to the scores of self-attention.
    Entry("t5", _t5, _T5, gain=1.5 * 32**-0.25),  # T5 does not divide its scores by sqrt(head_dim)
    Entry(
        "bart",
        _bart,
        (
            Rewritten("encoder.layers.?.self_attn", 1),
            Rewritten("decoder.layers.?.self_attn", 1, mask="causal"),
            Rewritten("decoder.layers.?.encoder_attn", 1),
        ),
    ),
]
