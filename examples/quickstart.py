"""The main job on a learned workload: compile with the sparge backend, look at what it did, compare with dense.

    python examples/quickstart.py [--tokens 16384] [--sequences 6] [--spread 1]

A small trained transformer (examples/recall) reads a stream in which keys and values are planted and is then asked for
the values. A dropped tile that mattered shows as a wrong answer. With `--spread 16` the questions stand alone among
distractors instead of in a row: the hard case for a method that looks at the mean of 128 queries (try
`sparge.rewriting(predictor="sparge")`).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import positive, stop_if_all_dense, verdict

import sparge_compile as sparge

sys.path.insert(0, str(Path(__file__).parent / "recall"))
from data import RecallBatch, make_batch
from model import load_pretrained

QUESTIONS = 64


@dataclass(frozen=True)
class Run:
    """Answers of one variant: logits per sequence, share of right answers, seconds of each sequence."""

    logits: list[torch.Tensor]
    recall: float
    seconds: list[float]


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = arguments.tokens or (65536 if device.type == "cuda" else 16384)
    model = load_pretrained().to(device)
    generator = torch.Generator().manual_seed(1)
    sizes = {"pairs": QUESTIONS, "queries": QUESTIONS, "spread": arguments.spread}
    batches = [make_batch(1, tokens, generator=generator, **sizes) for _ in range(arguments.sequences)]

    compiled = torch.compile(model, backend="sparge", options={"sparge.min_tokens": arguments.min_tokens})
    first = batches[0]
    report = sparge.explain(compiled, first.tokens.to(device), first.query_positions.to(device))
    print(f"{tokens} tokens on {device}, torch {torch.__version__}\n\n{report}\n")
    stop_if_all_dense(report)

    print(f"{len(batches)} sequences, {QUESTIONS} questions each; compiling both variants ...", flush=True)
    dense, sparse = measure(compiled, batches, device)
    describe(dense, sparse)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, help="length of each sequence (16384; 65536 on a GPU)")
    parser.add_argument("--sequences", type=positive, default=6, help="how many sequences")
    parser.add_argument("--spread", type=positive, default=1, help="tokens from one question to the next, on average")
    parser.add_argument("--min-tokens", type=positive, help="rewrite from this length on; default: the device's")
    return parser.parse_args()


@torch.no_grad()
def measure(compiled: Callable[..., torch.Tensor], batches: list[RecallBatch], device: torch.device) -> tuple[Run, Run]:
    """(dense, sparse): both variants of the compiled model on every sequence, in turn, so that noise hits both."""
    logits: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for enabled in (False, True):
        answer(compiled, batches[0], device, enabled)  # compiles
    for batch, first in zip(batches, itertools.cycle((False, True))):
        for enabled in (first, not first):
            start = time.perf_counter()
            logits[enabled].append(answer(compiled, batch, device, enabled))
            seconds[enabled].append(time.perf_counter() - start)
    dense, sparse = (
        Run(logits[enabled], recall(logits[enabled], batches), seconds[enabled]) for enabled in (False, True)
    )
    return dense, sparse


def answer(
    compiled: Callable[..., torch.Tensor], batch: RecallBatch, device: torch.device, enabled: bool
) -> torch.Tensor:
    """Logits [1, questions, vocabulary] on the CPU. With rewriting off the model is the plain Inductor one."""
    with sparge.rewriting(enabled=enabled):
        return compiled(batch.tokens.to(device), batch.query_positions.to(device)).cpu()


def recall(logits: list[torch.Tensor], batches: list[RecallBatch]) -> float:
    """Share of the questions answered with the planted value."""
    right = [(out.argmax(-1) == batch.targets).float().mean() for out, batch in zip(logits, batches, strict=True)]
    return torch.stack(right).mean().item()


def describe(dense: Run, sparse: Run) -> None:
    """Prints accuracy, agreement and time of both, and says which is faster."""
    difference = sum((a - b).abs().sum() for a, b in zip(sparse.logits, dense.logits, strict=True))
    relative_l1 = difference / sum(out.abs().sum() for out in dense.logits)
    print(f"{'':8}{'recall':>8}{'seconds':>10}")
    for name, run in (("dense", dense), ("sparse", sparse)):
        print(f"{name:8}{run.recall:8.1%}{statistics.median(run.seconds):10.3f}")
    print(f"relative L1 of the logits, sparse against dense: {relative_l1:.4f}")
    print(verdict(dense.seconds, sparse.seconds))


if __name__ == "__main__":
    main()
