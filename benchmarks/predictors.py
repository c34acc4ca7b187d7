"""Which predictor keeps fewer tiles at equal errors, and what the default thresholds give on every workload.

    python benchmarks/predictors.py [--tokens 4096 8192] [--workloads NAME ...] [--markdown FILE]

For each workload of tests/workloads: the least density at which the relative L1 against dense attention is at most
0.045 (0.05 less what INT8 adds), every row's cosine at least 0.955 and every needle found, over a grid of thresholds,
for the paper's predictor and for "clusters"; then density and errors of the rules that `Policy()` uses. Selection
alone, in fp32; errors are of query tiles spread evenly over the sequence and of those that hold needles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from sparge_compile.rules import rule_for
from sparge_kernels.predict import Prediction, predict
from sparge_kernels.thresholds import K_TILE, Q_TILE, Thresholds
from sparge_kernels.tiles import tile_count
from workloads import WORKLOADS, Workload

MAX_ERROR, MIN_COSINE = 0.045, 0.955
SAMPLED = 24  # query tiles of each head

CDF = {
    "sparge": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0),
    "clusters": (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0),
}
SIMILARITY = {"sparge": (0.0, 0.3, 0.5), "clusters": (-1.0, 0.15)}


@dataclass(frozen=True)
class Quality:
    """Of one choice of tiles: share of the visible tiles, relative L1, the worst row's cosine, all needles found."""

    density: float
    error: float
    cosine: float
    finds: bool

    @property
    def allowed(self) -> bool:
        return self.error <= MAX_ERROR and self.cosine >= MIN_COSINE and self.finds

    def __str__(self) -> str:
        lost = "" if self.finds else ", needle lost"
        return f"{self.density:.2f} ({self.error:.3f}, {self.cosine:.3f}{lost})"


@dataclass(frozen=True)
class Truth:
    """Exact rows of one head: softmax [rows, Sk], dense output [rows, D], their query tiles [tiles]."""

    weights: Tensor
    output: Tensor
    tiles: Tensor


def main() -> None:
    arguments = parse_arguments()
    lines = []
    for tokens in arguments.tokens:
        lines += [f"\n{tokens} tokens\n", "| workload | paper | clusters | default rule |", "|---|---|---|---|"]
        for name in arguments.workloads:
            lines.append(row(name, tokens))
            print(lines[-1], flush=True)
    if arguments.markdown:
        Path(arguments.markdown).write_text("\n".join(lines) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--markdown", help="write the tables to this file")
    return parser.parse_args()


@torch.no_grad()
def row(name: str, tokens: int) -> str:
    """One line of the table."""
    work = WORKLOADS[name](tokens)
    truths = [truth(work, head) for head in range(work.q.shape[1])]
    cells = []
    for predictor in ("sparge", "clusters"):
        prediction = predicted(work, predictor)
        tried = (quality(work, prediction, truths, entry) for entry in grid(predictor))
        allowed = [one for one in tried if one.allowed]
        cells.append(str(min(allowed, key=lambda one: one.density)) if allowed else "none")
    rule = rule_for("auto", work.is_causal)
    prediction = prediction if rule.predictor == "clusters" else predicted(work, rule.predictor)
    cells.append(str(quality(work, prediction, truths, rule.thresholds)))
    return " | ".join((f"| {name}", *cells)) + " |"


def grid(predictor: str) -> Iterable[Thresholds]:
    for similarity in SIMILARITY[predictor]:
        for cdf in CDF[predictor]:
            yield Thresholds(None, cdf, similarity, None)


def predicted(work: Workload, predictor: str) -> Prediction:
    scale = work.q.shape[-1] ** -0.5
    return predict(work.q, work.k, work.v, is_causal=work.is_causal, scale=scale, predictor=predictor)


def truth(work: Workload, head: int) -> Truth:
    """Dense attention of the sampled query tiles of one head."""
    q_len, k_len, dim = work.q.shape[2], work.k.shape[2], work.q.shape[3]
    count = tile_count(q_len, Q_TILE)
    spread = torch.linspace(0, count - 1, min(count, SAMPLED)).round().long()
    needles = torch.tensor([n.query // Q_TILE for n in work.needles if n.head == head], dtype=torch.long)
    tiles = torch.cat([spread, needles]).unique()
    rows = (tiles[:, None] * Q_TILE + torch.arange(Q_TILE)).flatten()
    rows = rows[rows < q_len]
    scores = work.q[0, head, rows] @ work.k[0, head].T * dim**-0.5
    if work.is_causal:
        scores = scores.masked_fill(torch.arange(k_len) > rows[:, None], -torch.inf)
    weights = scores.softmax(-1)
    return Truth(weights, weights @ work.v[0, head], tiles)


def quality(work: Workload, prediction: Prediction, truths: list[Truth], entry: Thresholds) -> Quality:
    """Errors over the sampled rows of all heads; the density of the whole call."""
    kept = torch.stack([prediction.keep(head, entry)[0] for head in range(len(truths))])  # [H, nQ, nK]
    visible = (prediction.whole | prediction.partial)[0].sum()
    difference = total = torch.zeros(())
    cosine = torch.ones(())
    for head, exact in enumerate(truths):
        rows = kept[head, exact.tiles].repeat_interleave(Q_TILE, 0)[: len(exact.weights)]
        keys = rows.repeat_interleave(K_TILE, 1)[:, : work.k.shape[2]]
        weights = exact.weights * keys
        output = weights @ work.v[0, head] / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        difference = difference + (output - exact.output).abs().sum()
        total = total + exact.output.abs().sum()
        cosine = torch.minimum(cosine, F.cosine_similarity(output, exact.output, dim=-1).min())
    finds = all(bool(kept[n.head, n.query // Q_TILE, n.key // K_TILE]) for n in work.needles)
    return Quality(float(kept.sum() / visible), float(difference / total), float(cosine), finds)


if __name__ == "__main__":
    main()
