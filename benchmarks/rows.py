"""Rows of the benchmark's table: every peer on one problem is prepared, checked, then timed in turn with the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import accuracy
import peak_memory
from peers import DENSE, OURS, Call, Peer, sparge_density
from problem import ONE_TILE, Problem
from torch import Tensor


@dataclass
class Row:
    """One variant on one problem. None: does not apply, or may not be believed; `note` says why.

    density_asked: None is one tile a row. ratio, ratio_min, ratio_max: baseline time / time, paired by repeat.
    extra_memory_percent: peak memory of a call beyond inputs and output, of what Q, K and V take in fp32.
    """

    tokens: int
    density_asked: float | None
    variant: str
    density: float | None = None
    relative_l1: float | None = None
    worst_cosine: float | None = None
    milliseconds: float | None = None
    ratio: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    gflops: float | None = None
    extra_memory_percent: float | None = None
    note: str = ""
    failed: bool = False


@dataclass
class Examined:
    """A peer after its check: `call` is None if it is not to be timed, and the row says why."""

    row: Row
    call: Call | None = None
    output: Tensor | None = None


@dataclass
class Shape:
    """One shape and all that is measured on it.

    small: a problem of the same kind that the reference can afford. repeats: rounds in which each variant runs once.
    """

    peers: Mapping[str, Peer]
    problem: Problem
    small: Problem
    threads: int
    repeats: int
    dense: dict[str, Examined] = field(init=False, default_factory=dict)  # the same for every density
    expected: Tensor = field(init=False)  # dense fp32 attention

    def __post_init__(self) -> None:
        # Dense fp32 attention is what all others are compared with; itself it is checked against the reference.
        self.expected = self.peers["dense fp32"].prepare(self.problem)()
        for name, peer in self.peers.items():
            if not peer.sparse:
                self.dense[name] = self.examine(name, self.problem, None)

    def measure(self, density: float | None) -> list[Row]:
        """One block of rows: all variants at a share of tiles, or, for None, the cost of choosing them."""
        problem = replace(self.problem, topk=ONE_TILE if density is None else density)
        block = {name: replace(one, row=replace(one.row, density_asked=density)) for name, one in self.dense.items()}
        same_tiles = None
        for name, peer in self.peers.items():
            if peer.sparse and (density is not None or name == OURS):
                block[name] = self.examine(name, problem, same_tiles)
                block[name].row.density_asked = density
                same_tiles = block[OURS].output
        self.time({name: one for name, one in block.items() if one.call})
        if density is not None and block[OURS].call:
            taken = peak_memory.extra_bytes(problem, self.threads)
            if taken is not None:
                block[OURS].row.extra_memory_percent = 100 * taken / sum(x.numel() * 4 for x in problem.inputs)
        return [one.row for one in block.values()]

    def examine(self, name: str, problem: Problem, same_tiles: Tensor | None) -> Examined:
        """Prepares the peer, runs it once and compares what it gives."""
        peer = self.peers[name]
        small = replace(self.small, topk=problem.topk)
        row = Row(problem.q.shape[2], None, f"{name} {problem.precision}" if name == OURS else name)
        try:
            call = peer.prepare(problem)
            output = call()
        except Exception as error:  # whatever a compiler may raise: a platform it does not support, no C++ compiler
            if name == OURS or not peer.sparse:
                raise
            words = " ".join(str(error).split())[:160].replace("|", "/")
            row.note = f"not measured ({type(error).__name__}: {words})"
            return Examined(row)
        row.density = sparge_density(problem) if peer.sparse else 1.0
        reason = accuracy.failure(peer, problem, small, output=output, dense=self.expected, same_tiles=same_tiles)
        if reason is not None:
            row.note, row.failed = reason, True
            return Examined(row, output=output)
        found = accuracy.compare(output, self.expected)
        row.relative_l1, row.worst_cosine = found.relative_l1, found.worst_cosine
        return Examined(row, call, output)

    def time(self, block: Mapping[str, Examined]) -> None:
        """Fills in times and ratios. The variants run in turn, so that what else the machine does hits all of them."""
        rounds = [{name: seconds(one.call) for name, one in block.items() if one.call} for _ in range(self.repeats)]
        medians = {name: statistics.median(times[name] for times in rounds) for name in block}
        baseline = min((name for name in medians if name.startswith(DENSE)), key=medians.__getitem__, default=None)
        for name, one in block.items():
            row = one.row
            row.milliseconds = medians[name] * 1e3
            row.gflops = self.problem.dense_flops / medians[name] / 1e9
            if name == baseline:
                row.note = "baseline"
            elif baseline is not None:
                ratios = [times[baseline] / times[name] for times in rounds]
                row.ratio, row.ratio_min, row.ratio_max = statistics.median(ratios), min(ratios), max(ratios)
                row.note = verdict(row)


def verdict(row: Row) -> str:
    """What the ratio means, in words."""
    assert row.ratio is not None
    no_gain = "no gain" if row.ratio < 1 else ""
    if row.density_asked is None and row.variant.startswith(OURS):
        bound = f"prediction and quantization: at most {100 / row.ratio:.2g} % of the baseline"
        return f"{bound}, {no_gain}" if no_gain else bound
    return no_gain


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


COLUMNS = (
    "tokens",
    "density asked",
    "density",
    "variant",
    "relative L1 to dense fp32",
    "cosine of the worst row",
    "time (ms)",
    "speed over baseline (min .. max)",
    "effective GFLOPS",
    "extra memory (% of Q, K, V in fp32)",
    "note",
)


def table_head() -> str:
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def table_line(row: Row) -> str:
    def number(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    speed = "-" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_min:.2f} .. {row.ratio_max:.2f})"
    cells = (
        str(row.tokens),
        "1 tile a row" if row.density_asked is None else f"{row.density_asked:g}",
        number(row.density, ".3f"),
        row.variant,
        number(row.relative_l1, ".2e"),
        number(row.worst_cosine, ".4f"),
        number(row.milliseconds, ".2f"),
        speed,
        number(row.gflops, ".1f"),
        number(row.extra_memory_percent, ".1f"),
        row.note,
    )
    return f"| {' | '.join(cells)} |"
