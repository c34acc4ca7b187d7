"""Long-context prefill of a decoder of transformers, compiled with the sparge backend; decoding stays dense.

    pip install transformers
    python examples/transformers_prefill.py [--tokens 8192] [--model Qwen/Qwen3-0.6B] [--text book.txt]

Without --model a small Qwen3 with random weights reads bytes. One decoded token asks one query, which sparse attention
cannot make cheaper, so only the prefill is compiled here. Under `model.compile(backend="sparge")` and `generate` the
decoding steps come to the same backend: they stay dense.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import RANDOM_WEIGHTS, compare, positive, stop_if_all_dense
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, Qwen3Config

import sparge_compile as sparge

LONG_TEXT = Path(torch.nn.functional.__file__)
COMPARED = 128  # the last positions of the prompt, or all


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, prompt = load(options, torch.bfloat16 if device == "cuda" else torch.float32)
    model, prompt = model.to(device).eval(), prompt.to(device)
    prefill = torch.compile(model, backend="sparge", options={"sparge.min_tokens": options.min_tokens})

    def read_prompt() -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache(config=model.config)
        output = prefill(prompt, **with_cache(model, cache), use_cache=True, logits_to_keep=COMPARED)
        return output.logits[0], cache  # [COMPARED, vocabulary]

    def dense() -> Tensor:
        with sparge.rewriting(enabled=False):
            return read_prompt()[0]

    def sparse() -> Tensor:
        return read_prompt()[0]

    report = sparge.explain(prefill, prompt, logits_to_keep=1)
    print(f"prefill of {prompt.shape[1]} tokens on {device}\n\n{report}\n")
    stop_if_all_dense(report)
    comparison = compare(dense, sparse, options.rounds)
    agree = (comparison.dense.argmax(-1) == comparison.sparse.argmax(-1)).float().mean()
    print(f"{comparison}\nnext token as dense at {agree:.1%} of the last {len(comparison.dense)} positions")

    logits, cache = read_prompt()
    next_token = logits[-1:].argmax(-1, keepdim=True)
    one_step = sparge.explain(prefill, next_token, **with_cache(model, copy.deepcopy(cache)))
    print(f"\na decoding step: {one_step}")
    with sparge.rewriting(enabled=False):
        dense_logits, dense_cache = read_prompt()
    after_sparse = decode(model, next_token, cache, options.new_tokens)
    after_dense = decode(model, dense_logits[-1:].argmax(-1, keepdim=True), dense_cache, options.new_tokens)
    print(f"\ndecoded after a sparse prefill {after_sparse}\ndecoded after a dense prefill  {after_dense}")
    if not options.model:
        print(RANDOM_WEIGHTS)


def decode(model: PreTrainedModel, token: Tensor, cache: DynamicCache, count: int) -> list[int]:
    """The `count` likeliest tokens from `token` [1, 1] on, by the model as it is (or compiled with Inductor alone)."""
    tokens = [token]
    while len(tokens) < count:
        tokens.append(model(tokens[-1], **with_cache(model, cache)).logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)[0].tolist()


def with_cache(model: PreTrainedModel, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The cache under the name that the model has for it: `past_key_values` before transformers 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def load(options: argparse.Namespace, dtype: torch.dtype) -> tuple[PreTrainedModel, Tensor]:
    """The model and a prompt [1, tokens] from the beginning of the text."""
    text = options.text.read_text()
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        ids = AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt").input_ids
    else:
        torch.manual_seed(0)
        size = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": options.layers}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
        positions = options.tokens + options.new_tokens
        config = Qwen3Config(vocab_size=256, max_position_embeddings=positions, **size, **heads)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        ids = torch.tensor([list(text.encode())])
    if ids.shape[1] < options.tokens:
        raise SystemExit(f"{options.text} has {ids.shape[1]} tokens: lower --tokens or name a longer --text.")
    return model, ids[:, : options.tokens]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model of the hub, or its folder")
    parser.add_argument("--text", type=Path, default=LONG_TEXT, help="the prompt (a long source file of torch)")
    parser.add_argument("--tokens", type=positive, default=8192, help="how many of its tokens")
    parser.add_argument("--new-tokens", type=positive, default=8, help="how many to decode")
    parser.add_argument("--layers", type=positive, default=2, help="of the random model")
    parser.add_argument("--min-tokens", type=positive, help="rewrite from this length on; default: the device's")
    parser.add_argument("--rounds", type=positive, default=3, help="how often each variant is measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
