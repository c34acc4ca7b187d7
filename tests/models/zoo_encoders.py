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


def _t5(**fields: Any) -> Call:
    config = {"vocab_size": 256, "d_model": 128, "d_kv": 32, "d_ff": 192, "num_layers": 2, "num_decoder_layers": 2}
    inputs = {"input_ids": tokens(1, 300), "decoder_input_ids": tokens(1, 200)}
    return from_transformers("T5Model", {**config, "num_heads": 4, **fields}, **inputs)


def _bart() -> Call:
    sizes = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in _BART.items()}
    config = {"vocab_size": 256, "d_model": 128, "max_position_embeddings": 512, **sizes}
    return from_transformers("BartModel", config, input_ids=tokens(1, 300), decoder_input_ids=tokens(1, 200))


_BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 192}


ENCODERS = [
    Entry("bert", _bert, (Rewritten("encoder.layer.?.attention.self", 2),)),
    Entry("bert-padded", _bert_with_padding, ()),
    Entry("bert-eager", _bert_eager, ()),
    Entry("modernbert", _modernbert, ()),
    Entry("deberta-v2", _deberta, ()),
    Entry("mpnet", _mpnet, ()),
    Entry("xlnet", _xlnet, ()),
    Entry("longformer", _longformer, ()),
    # T5 adds a learned position bias to the scores of self-attention: a mask that depends on weights.
    Entry("t5", _t5, (), gain=1.5 * 32**-0.25),  # T5 does not divide its scores by sqrt(head_dim)
    Entry("t5-eager", lambda: _t5(attn_implementation="eager"), (), gain=1.5 * 32**-0.25),
    Entry("bart", _bart, ()),
]
