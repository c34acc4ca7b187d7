"""How long `calibrate` takes, in dense forward passes over the same inputs, and what it chooses.

    python benchmarks/calibration.py --write

measures the recall model of examples/recall and a transformer over a smooth field. Dense is the model run eagerly, in
the same process, before and after the calibration; the ratio is to the mean of the two.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparge_compile as sparge
from sparge_compile.bench.machine import describe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "calibration.md"
LIMIT = 5.0
"""Calibration takes at most this many times the dense forward passes over its inputs."""


class FieldAttention(nn.Module):
    """Self-attention whose queries and keys are those of the field it is given, turned a little by each layer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            turn = torch.linalg.qr(torch.randn(dim, dim))[0]
            near = torch.linalg.qr(turn + 0.2 * torch.randn(dim, dim) / dim**0.5)[0]
            self.qkv.weight.copy_(torch.cat([turn, near, torch.linalg.qr(torch.randn(dim, dim))[0]]))
            self.out.weight.copy_(0.3 * torch.eye(dim))
        self.gain = nn.Parameter(torch.linspace(2.0, 4.0, heads)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = (F.normalize(part, dim=-1) * self.gain * part.shape[-1] ** 0.25 for part in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FieldTransformer(nn.Module):
    """Attention and MLP, with residuals, `layers` times; x [B, S, dim]."""

    def __init__(self, layers: int = 3, dim: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.attention = nn.ModuleList(FieldAttention(dim, heads) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(F.rms_norm(x, x.shape[-1:]))
            x = x + 0.1 * mlp(F.rms_norm(x, x.shape[-1:]))
        return x


def recall(tokens: int, inputs: int) -> tuple[nn.Module, list[Any]]:
    """The trained model and sequences it answers."""
    sys.path.insert(0, str(ROOT / "examples" / "recall"))
    from data import make_batch
    from model import load_pretrained

    generator = torch.Generator().manual_seed(0)
    batches = [make_batch(1, tokens, pairs=32, queries=32, generator=generator) for _ in range(inputs)]
    return load_pretrained(), [(batch.tokens, batch.query_positions) for batch in batches]


def field(tokens: int, inputs: int) -> tuple[nn.Module, list[Any]]:
    """A transformer over smooth fields of rows of 128 tokens."""
    sys.path.insert(0, str(ROOT / "tests"))
    from workloads import smooth_field

    torch.manual_seed(0)
    model = FieldTransformer().eval().requires_grad_(False)
    grid = (1, tokens // 128, 128)
    fields = [smooth_field(grid, heads=4, head_dim=64, seed=seed)[1] for seed in range(inputs)]
    return model, [x.transpose(1, 2).flatten(2) for x in fields]


WORKLOADS: dict[str, tuple[Callable[[int, int], tuple[nn.Module, list[Any]]], int, int]] = {
    "recall model": (recall, 16384, 3),
    "smooth field, 3 layers": (field, 8192, 2),
}


def dense_seconds(model: nn.Module, batches: Sequence[Any]) -> float:
    """Eager forward passes over all inputs, under no_grad."""
    began = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    return time.perf_counter() - began


def measure(name: str, scale: float, max_error: float) -> tuple[str, str, bool]:
    """(table row, profile table, within the limit?) of one workload; `scale` shortens its sequences."""
    make, tokens, inputs = WORKLOADS[name]
    tokens = int(tokens * scale) // 128 * 128
    model, batches = make(tokens, inputs)
    dense_seconds(model, batches[:1])
    before = dense_seconds(model, batches)
    began = time.perf_counter()
    profile = sparge.calibrate(model, batches, max_error=max_error, progress=False)
    took = time.perf_counter() - began
    dense = (before + dense_seconds(model, batches)) / 2
    measured = [m for entries in profile.measured.values() for m in entries]
    density = sum(m.density for m in measured) / max(len(measured), 1)
    error, row = max((m.error for m in measured), default=0), min((m.worst_row for m in measured), default=1)
    cells = (name, tokens, inputs, f"{dense:.1f}", f"{took:.1f}", f"{took / dense:.2f}")
    cells = (*cells, f"{density:.3f}", f"{error:.4f}", f"{row:.4f}", len(profile.dense))
    return "| " + " | ".join(str(cell) for cell in cells) + " |", str(profile), took <= LIMIT * dense


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(WORKLOADS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the sequence lengths")
    parser.add_argument("--max-error", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [args.only] if args.only else list(WORKLOADS)
    found = [measure(name, args.scale, args.max_error) for name in names]
    header = ("model", "tokens", "inputs", "dense, s", "calibrate, s", "ratio")
    header = (*header, "mean density", "largest error", "worst row", "dense sites")
    table = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *(row for row, _, _ in found)]
    facts = [f"- {key}: {value}" for key, value in describe(args.threads).items()]
    profiles = [f"```\n{profile}\n```" for _, profile, _ in found]
    command = "`python benchmarks/calibration.py --write`: `calibrate` against dense forward passes of its inputs."
    text = "\n\n".join([f"# Calibration\n\n{command}", "\n".join(facts), "\n".join(table), *profiles]) + "\n"
    print(text)
    if args.write:
        RESULTS.write_text(text)
    return 0 if all(within for _, _, within in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
