"""Rows of the benchmark's table: every peer on one problem is prepared, checked, then timed in turn with the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from sparge_compile.bench import accuracy
from sparge_compile.bench.accuracy import Check
from sparge_compile.bench.exact import Expected
from sparge_compile.bench.peers import DENSE, OURS, Call, sparge_density
from sparge_compile.bench.problem import ALL_TILES, ONE_TILE, Choice, Problem
from sparge_compile.bench.target import Target
from sparge_compile.bench.timing import FEWEST_ROUNDS, Stopwatch, Timing, rounds
from sparge_kernels.records import is_out_of_memory
from sparge_kernels.thresholds import K_TILE, Q_TILE

LEAST_GAIN = 1.02  # times as fast: what is nearer to 1 is no gain to anybody

Trouble = Literal["gate failed", "failed", "not measured"]
"""An output that may not be believed; a kernel that raised an error; no memory, no time, or a peer that is not here."""
Gain = Literal["gain", "unclear", "no gain"]


@dataclass
class Row:
    """One variant on one problem. None: does not apply, or may not be believed.

    tokens: queries; k_len: keys. choice: the `Choice` of tiles, by name; density_asked: the density it asks for.
    ratio, ratio_min, ratio_max: baseline time / time, paired by round; ratio_low, ratio_high: quartiles of it.
    issue_milliseconds: what the host takes to issue the call. extra_memory_percent: peak memory of a call beyond inputs
    and output, of what Q, K and V take. product_operations: of one of the two products over the computed tiles.
    roofline_share: of the time, what the machine's ceilings would take. stages: milliseconds of parts of the call.
    prepare_percent: stage 1 and quantization, of the baseline's time; prepare_copy_share: what copying their inputs and
    outputs would take, of their time. is_baseline: it is the fastest dense variant. trouble: why there is no time, with
    the reason in `note`, which else says what there is to say of the numbers.
    """

    tokens: int
    head_dim: int
    is_causal: bool
    density_asked: float | None
    variant: str
    choice: str = ""
    k_len: int | None = None
    density: float | None = None
    relative_l1: float | None = None
    worst_cosine: float | None = None
    rounds: int = 0
    milliseconds: float | None = None
    issue_milliseconds: float | None = None
    ratio: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    gflops: float | None = None
    product_operations: float | None = None
    roofline_share: float | None = None
    extra_memory_percent: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    prepare_percent: float | None = None
    prepare_copy_share: float | None = None
    is_baseline: bool = False
    trouble: Trouble | None = None
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.variant.split()[0] == OURS

    @property
    def is_dense(self) -> bool:
        return self.variant.split()[0] == DENSE

    @property
    def failed(self) -> bool:
        return self.trouble in ("gate failed", "failed")

    @property
    def gain(self) -> Gain | None:
        """By the middle half of the ratios, as they are shown; None where there are none."""
        if self.ratio_low is None or self.ratio_high is None:
            return None
        if self.rounds < FEWEST_ROUNDS:
            return "unclear"
        if round(self.ratio_low, 2) >= LEAST_GAIN:
            return "gain"
        return "no gain" if round(self.ratio_high, 2) < LEAST_GAIN else "unclear"


@dataclass
class Examined:
    """A peer after its check: `call` is None if it is not to be timed, and the row says why.

    output: what it gave, if that may be believed; dropped once others were compared with it. stages: parts of the call.
    """

    row: Row
    check: Check
    call: Call | None = None
    output: Tensor | None = None
    stages: Mapping[str, Callable[[], object]] = field(default_factory=dict)


@dataclass
class Shape:
    """One shape and all that is measured on it.

    small: a problem of the same kind that the reference can afford. repeats: rounds in which each variant runs once;
    fewer where the deadline (of time.monotonic) comes first.
    ours_or_none: time nothing of a block in which a check of the project's kernel failed, be it the one with all tiles,
    which is then made in any case, or no dense variant passed its own.
    """

    target: Target
    problem: Problem
    small: Problem
    repeats: int
    deadline: float = float("inf")
    ours_or_none: bool = False
    dense: list[Examined] = field(init=False, default_factory=list)  # the same for every density
    expected: Expected = field(init=False)

    def __post_init__(self) -> None:
        # What all others are compared with. Itself it is, or is like, a dense peer, which is checked by the reference.
        self.expected = self.target.expected(self.problem)
        for name, peer in self.target.peers.items():
            if not peer.sparse:
                one = self.examine(name, Check(self.problem, self.small, self.expected))
                self.dense.append(replace(one, output=None))

    def measure(self, choices: Sequence[Choice]) -> list[Row]:
        """One block of rows: all variants with each choice of tiles; ONE_TILE is what choosing them costs."""
        first = choices[0]
        labelled = [replace(one.row, choice=first.name, density_asked=first.density) for one in self.dense]
        block = [replace(one, row=row) for one, row in zip(self.dense, labelled, strict=True)]
        if self.ours_or_none and not any(one.call for one in block):
            return [one.row for one in block]
        for choice in choices:
            block += self.sparse(choice)
        if self.ours_or_none:
            if not any(choice.keeps_all for choice in choices):
                all_tiles = self.examine(OURS, self.check(ALL_TILES))
                block += [all_tiles] if all_tiles.row.failed else []
            if any(one.row.failed and one.row.is_ours for one in block):
                return [one.row for one in block]
        self.time([one for one in block if one.call])
        for one in block:
            if one.row.is_ours and one.call and one.row.choice != ONE_TILE.name:
                taken = self.target.extra_bytes(one.check.problem, one.call)
                if taken is not None:
                    one.row.extra_memory_percent = 100 * taken / self.target.input_bytes(one.check.problem)
        return [one.row for one in block]

    def check(self, choice: Choice) -> Check:
        return Check(replace(self.problem, choice=choice), replace(self.small, choice=choice), self.expected)

    def sparse(self, choice: Choice) -> list[Examined]:
        """The variants that compute the kept tiles only; the project's own first, the others must agree with it."""
        check = self.check(choice)
        found = []
        for name, peer in self.target.peers.items():
            if peer.sparse and (choice != ONE_TILE or name == OURS):
                one = self.examine(name, check)
                if name == OURS:
                    check = replace(one.check, same_tiles=one.output, selection=None)
                found.append(one)
        return [replace(one, check=Check(check.problem, self.small, self.expected), output=None) for one in found]

    def examine(self, name: str, check: Check) -> Examined:
        """Prepares the peer, runs it once and compares what it gives."""
        peer, problem = self.target.peers[name], check.problem
        variant = f"{name} {problem.precision}" if name == OURS else name
        (q_len, head_dim), k_len, choice = problem.q.shape[2:], problem.k.shape[2], problem.choice
        row = Row(q_len, head_dim, problem.is_causal, choice.density, variant, choice.name, k_len)
        try:
            if name == OURS:
                check = self.target.checked_tiles(check)
            call = peer.prepare(problem)
            output = call()
            row.density = sparge_density(problem) if peer.sparse else 1.0
            reason = accuracy.failure(peer, output, check)
        except Exception as error:  # whatever a compiler may raise: a platform it does not support, no C++ compiler
            row.note = in_words(error)
            row.trouble = "failed" if name == OURS and not is_out_of_memory(error) else "not measured"
            return Examined(row, check)
        if reason is not None:
            row.note, row.trouble = reason, "gate failed"
            return Examined(row, check)
        row.product_operations = 2 * Q_TILE * K_TILE * problem.q.shape[3] * problem.visible_tiles() * row.density
        found = accuracy.compare(output, check.expected)
        row.relative_l1, row.worst_cosine = found.relative_l1, found.worst_cosine
        return Examined(row, check, call, output, self.stages(row, problem) if name == OURS else {})

    def stages(self, row: Row, problem: Problem) -> Mapping[str, Callable[[], object]]:
        """The parts of the project's call; none, with a note, where they cannot be run apart."""
        try:
            found = self.target.stages(problem)
            for stage in found.values():
                stage()
        except Exception as error:  # whatever a compiler may raise: the whole call is timed all the same
            row.note = f"stages not measured ({in_words(error)})"
            return {}
        return found

    def time(self, block: Sequence[Examined]) -> None:
        """Fills in times and ratios."""
        watches: dict[str, Stopwatch] = {}
        for at, one in enumerate(block):
            assert one.call is not None
            for stage, call in {"": one.call, **one.stages}.items():
                watches[f"{at} {stage}"] = self.target.stopwatch(call)
        rounds(watches, self.target.warm_up)
        measured = rounds(watches, self.repeats, self.deadline)
        medians = {name: statistics.median(times[name].seconds for times in measured) for name in watches}
        candidates = [f"{at} " for at, one in enumerate(block) if one.row.is_dense]
        baseline = min(candidates, key=medians.__getitem__, default=None)
        for at, one in enumerate(block):
            name, row = f"{at} ", one.row
            row.rounds = len(measured)
            row.milliseconds = medians[name] * 1e3
            row.issue_milliseconds = issue([times[name] for times in measured])
            row.gflops = self.problem.dense_flops / medians[name] / 1e9
            row.stages = {stage: medians[f"{at} {stage}"] * 1e3 for stage in one.stages}
            if baseline is not None:
                compare(row, name, baseline, measured)
            self.target.judge(row, one.check.problem)


def compare(row: Row, name: str, baseline: str, measured: Sequence[Mapping[str, Timing]]) -> None:
    """Fills in what the baseline's time makes of the row's."""
    if name == baseline:
        row.is_baseline = True
        return
    ratios = [times[baseline].seconds / times[name].seconds for times in measured]
    row.ratio, row.ratio_min, row.ratio_max = statistics.median(ratios), min(ratios), max(ratios)
    row.ratio_low, row.ratio_high = quartiles(ratios)
    if "prepare" in row.stages:
        dense = statistics.median(times[baseline].seconds for times in measured)
        row.prepare_percent = 100 * row.stages["prepare"] / (dense * 1e3)
    row.note = ", ".join(filter(None, (row.note, *remarks(row))))


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(numbers) == 1:
        return numbers[0], numbers[0]
    first, _, third = statistics.quantiles(numbers, n=4, method="inclusive")
    return first, third


def remarks(row: Row) -> Iterator[str]:
    """What the ratio means, in words."""
    assert row.ratio is not None
    if row.choice == ONE_TILE.name and row.is_ours:
        yield f"prediction and quantization: at most {100 / row.ratio:.1f} % of the baseline"
    if row.gain == "no gain" and not row.is_dense:
        yield "no gain"


def issue(timings: Sequence[Timing]) -> float | None:
    """Median milliseconds of the host."""
    known = [timing.issue for timing in timings if timing.issue is not None]
    return statistics.median(known) * 1e3 if known else None


def in_words(error: Exception) -> str:
    """An error in a cell of a table."""
    words = " ".join(str(error).split())[:160].replace("|", "/")
    return f"{type(error).__name__}: {words}"
