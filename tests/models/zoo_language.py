"""Decoders that generate text: causal masks, windows, grouped heads, and what each adds to the scores."""

from __future__ import annotations

from typing import Any

import torch
from zoo_entry import SMALL, Call, Dense, Entry, Rewritten, from_transformers, padding, tokens


def llama(length: int = 300, **options: Any) -> Call:
    inputs = {"attention_mask": options.pop("attention_mask")} if "attention_mask" in options else {}
    config = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 512, **options}
    return from_transformers("LlamaForCausalLM", config, input_ids=tokens(2, length), **inputs)


def _llama_with_static_cache() -> Call:
    from transformers import StaticCache

    call = llama(200, attention_mask=padding(200, 120, to=200))
    cache = StaticCache(call.module.config, max_cache_len=320)
    cache.early_initialization(2, 2, 32, torch.float32, torch.device("cpu"))
    return call._replace(kwargs={**call.kwargs, "past_key_values": cache})


def _decoder(model: str, **fields: Any) -> Call:
    config = {**SMALL, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, **fields}
    return from_transformers(model, config, input_ids=tokens(1, 300))


def _llama_with_padding() -> Call:
    return llama(attention_mask=padding(220, 100, to=300))


def _mistral() -> Call:
    return _decoder("MistralForCausalLM", sliding_window=64)


def _gemma2() -> Call:
    layers = ["sliding_attention", "full_attention"]
    return _decoder("Gemma2ForCausalLM", query_pre_attn_scalar=32, sliding_window=64, layer_types=layers)


def _gemma3() -> Call:
    layers = ["sliding_attention", "full_attention"] * 2
    fields = {"query_pre_attn_scalar": 32, "sliding_window": 64, "layer_types": layers, "num_hidden_layers": 4}
    return _decoder("Gemma3ForCausalLM", **fields)


def _gpt2() -> Call:
    config = {
        "vocab_size": 256,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return from_transformers("GPT2LMHeadModel", {**config, "attn_implementation": "eager"}, input_ids=tokens(1, 300))


def _bloom() -> Call:
    config = {"vocab_size": 256, "hidden_size": 128, "n_layer": 2, "n_head": 4}
    return from_transformers("BloomForCausalLM", config, input_ids=tokens(1, 300))


def _falcon() -> Call:
    config = {**SMALL, "alibi": True, "new_decoder_architecture": False, "multi_query": True}
    return from_transformers("FalconForCausalLM", config, input_ids=tokens(1, 300))


def _gpt_oss() -> Call:
    layers = ["sliding_attention", "full_attention"]
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _decoder("GptOssForCausalLM", layer_types=layers, sliding_window=64, **experts)


def _deepseek() -> Call:
    heads = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 24}
    experts = {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    config = {**SMALL, "max_position_embeddings": 512, "moe_intermediate_size": 64, **heads, **experts}
    return from_transformers("DeepseekV3ForCausalLM", config, input_ids=tokens(1, 300))


def _qwen3_moe() -> Call:
    return _decoder("Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)


_LAYERS = "model.layers.?.self_attn"

LANGUAGE = [
    Entry("llama", llama, (Rewritten(_LAYERS, 2, mask="causal"),)),
    Entry("llama-padded", _llama_with_padding, (Rewritten(_LAYERS, 2, mask="given"),)),
    Entry("llama-static-cache", _llama_with_static_cache, (Rewritten(_LAYERS, 2, "given"),)),
    Entry("llama-eager", lambda: llama(attn_implementation="eager"), (Rewritten(_LAYERS, 2, "causal", "softmax"),)),
    Entry("mistral", _mistral, (Rewritten(_LAYERS, 2, mask="given"),)),
    # The scores go through tanh before the softmax.
    Entry("gemma2", _gemma2, (Dense(_LAYERS, 2, "softcap (tanh) on the scores", "softmax"),)),
    Entry(
        "gemma3",
        _gemma3,
        (
            Rewritten("model.layers.[02].self_attn", 2, mask="given"),
            Rewritten("model.layers.[13].self_attn", 2, mask="causal"),
        ),
    ),
    Entry("gpt2-eager", _gpt2, (Rewritten("transformer.h.?.attn", 2, "causal", "softmax"),)),
    Entry("bloom", _bloom, (Rewritten("transformer.h.?.self_attention", 2, "given", "softmax"),)),
    # One key head, broadcast over the query heads by the call itself, and a mask with ALiBi's slopes.
    Entry("falcon", _falcon, (Rewritten("transformer.h.?.self_attention", 2, "given"),)),
    # A learned sink takes a share of every softmax.
    Entry(
        "gpt-oss",
        _gpt_oss,
        (Dense(_LAYERS, 2, "a sink beside the keys", "softmax"),),
    ),
    Entry("deepseek-v3", _deepseek, (Rewritten(_LAYERS, 2, mask="causal"),)),
    Entry("qwen3-moe", _qwen3_moe, (Rewritten(_LAYERS, 2, mask="causal"),)),
]
