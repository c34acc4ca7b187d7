"""What finding and rewriting attention adds to a compile: the backend's own part beside Inductor's, on deep models.

Run from the repository root: python benchmarks/compile_overhead.py [--models llama llama-eager encoder] [--layers 32]
Both parts are timed in one compile from empty caches: "ours" is everything this package does in the backend call,
"Inductor" is what the same call then hands the graph to. TorchDynamo's tracing comes before both and is in "all".
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sparge_compile as sparge
from sparge_compile import backend as sparge_backend
from sparge_compile import dynamo
from sparge_compile.bench import machine

TOKENS = 256


def llama(layers: int, attention: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaModel(config).eval()
    return lambda ids: model(ids, use_cache=False).last_hidden_state, (torch.randint(0, 256, (1, TOKENS)),)


def encoder(layers: int) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    layer = nn.TransformerEncoderLayer(256, 8, 512, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval(), (torch.randn(1, TOKENS, 256),)


MODELS: dict[str, Callable[[int], tuple[Callable[..., Any], tuple[Tensor, ...]]]] = {
    "llama": lambda layers: llama(layers, "sdpa"),
    "llama-eager": lambda layers: llama(layers, "eager"),
    "encoder": encoder,
}


def measure(name: str, layers: int) -> str:
    """One line of the table."""
    model, inputs = MODELS[name](layers)
    spent = {"ours": 0.0, "inductor": 0.0}
    inductor = dynamo.compile_with_inductor

    def timed_inductor(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return inductor(*args)
        finally:
            spent["inductor"] += time.perf_counter() - start

    def timed_backend(*args: Any, **kwargs: Any) -> Any:
        start, before = time.perf_counter(), spent["inductor"]
        try:
            return sparge_backend.sparge(*args, **kwargs)
        finally:
            spent["ours"] += time.perf_counter() - start - (spent["inductor"] - before)

    dynamo.compile_with_inductor = timed_inductor
    try:
        torch._dynamo.reset()
        with torch.compiler.config.patch(force_disable_caches=True):
            compiled = torch.compile(model, backend=timed_backend, dynamic=False, options={"sparge.min_tokens": 0})
            start = time.perf_counter()
            compiled(*inputs)
            total = time.perf_counter() - start
    finally:
        dynamo.compile_with_inductor = inductor
    report = sparge.last_report()
    return (
        f"{name:>12} {len(report.rewritten):5d} of {len(report.sites):3d} {spent['ours'] * 1e3:9.0f} "
        f"{spent['inductor'] * 1e3:12.0f} {100 * spent['ours'] / spent['inductor']:11.2f} {total * 1e3:8.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    print("; ".join(f"{name}: {value}" for name, value in machine.describe(torch.get_num_threads()).items()) + ".\n")
    print(
        f"{'model':>12} {'rewritten':>12} {'ours ms':>9} {'Inductor ms':>12} {'ours / I. %':>11} {'all ms':>8}"
        f"   ({args.layers} layers)"
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in args.models:
            print(measure(name, args.layers), flush=True)


if __name__ == "__main__":
    main()
