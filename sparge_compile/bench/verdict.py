"""What a measurement means, in words: a gain, no gain, or why nothing can be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sparge_compile.bench.problem import Problem
from sparge_compile.bench.rows import BASELINE, Row
from sparge_compile.policy import Policy
from sparge_compile.thresholds import min_tokens
from sparge_kernels import ops

Outcome = Literal["gain", "unclear", "no gain", "gate failed", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """On one size. ratio: the fastest dense peer's time / ours; None where nothing was timed.

    left_dense: why a compiled model leaves such a call dense by default; None if it rewrites it.
    """

    tokens: int
    outcome: Outcome
    words: str
    ratio: float | None = None
    left_dense: str | None = None


def left_dense(problem: Problem) -> str | None:
    """Why `torch.compile(backend="sparge")` would leave such a call dense by default; None if it rewrites it."""
    device, precision = problem.q.device, problem.precision
    minimum, length = min_tokens(Policy(), device, precision), min(problem.q.shape[2], problem.k.shape[2])
    if length < minimum:
        return f"it has fewer than {minimum} tokens (min_tokens)"
    return ops.unmeasured(device, problem.dtype, precision)


def judge(rows: Sequence[Row], choice: str, kept: str | None, only_size: bool) -> Verdict:
    """The verdict on one size from its rows: on our kernel with the `choice` of tiles; `kept`: see `Verdict`."""
    ours = next((row for row in rows if row.is_ours and row.choice == choice), None)
    tokens = rows[0].tokens
    failed = next((row for row in rows if row.failed and row.is_ours), None)
    if failed is not None:
        words = f"Accuracy gate failed at {tokens} tokens ({failed.variant}): {failed.note.removeprefix('failed: ')}."
        return Verdict(tokens, "gate failed", f"{words} Nothing was timed.", left_dense=kept)
    baseline = next((row for row in rows if row.note == BASELINE), None)
    if ours is None or ours.ratio is None or baseline is None:
        why = "no dense peer could be timed" if ours is None or not ours.note else ours.note
        return Verdict(tokens, "not measured", f"Not measured at {tokens} tokens: {why}.", left_dense=kept)
    assert ours.ratio_low is not None and ours.ratio_high is not None
    outcome: Outcome = "gain" if ours.ratio_low > 1 else "no gain" if ours.ratio_high <= 1 else "unclear"
    words = _sentence(outcome, ours, baseline, "this size" if only_size else f"{tokens} tokens")
    return Verdict(tokens, outcome, f"{words} {_by_default(outcome, kept)}".strip(), ours.ratio, kept)


def _sentence(outcome: Outcome, ours: Row, baseline: Row, size: str) -> str:
    assert ours.relative_l1 is not None and ours.worst_cosine is not None and ours.density is not None
    speed = f"{ours.ratio:.2g} times as fast as the fastest dense peer ({baseline.variant})"
    spread = f"{ours.ratio_low:.2g} to {ours.ratio_high:.2g} in the middle half of {ours.rounds} rounds"
    thresholds = "default thresholds" if ours.choice == "default" else ours.choice
    computed = (
        f"{thresholds}, {ours.density:.0%} of the tiles computed, relative L1 {ours.relative_l1:.2g}, worst row's "
        f"cosine {ours.worst_cosine:.3f}"
    )
    if outcome == "gain":
        return f"At {size}: {speed}, {spread} ({computed})."
    if outcome == "unclear":
        return f"No clear gain at {size}: {speed}, but {spread}, which is noise ({computed})."
    return f"No gain at {size}: {speed}, {spread} ({computed})."


def _by_default(outcome: Outcome, kept: str | None) -> str:
    if outcome == "gain":
        return "" if kept is None else f"But a compiled model leaves such a call dense by default: {kept}."
    if kept is not None:
        return "A compiled model leaves such a call dense by default."
    if outcome == "unclear":
        return ""
    return "A compiled model rewrites such a call by default: set min_tokens above this length, or name it in dense."


def break_even(verdicts: Sequence[Verdict]) -> str:
    """From which length on there is a gain, in words; empty where nothing was timed."""
    timed = sorted((one for one in verdicts if one.ratio is not None), key=lambda one: one.tokens)
    if not timed:
        return ""
    gains = [one.outcome == "gain" for one in timed]
    first = next((at for at in range(len(timed)) if all(gains[at:])), None)
    if first is None:
        return f"Break-even: not reached, {timed[-1].tokens} tokens is the longest measured."
    if first == 0:
        return f"Break-even: at or below {timed[0].tokens} tokens, the shortest measured."
    return f"Break-even: between {timed[first - 1].tokens} and {timed[first].tokens} tokens."


def default_minimum(device: torch.device, precision: str) -> str:
    """What the backend does without being asked, in words."""
    minimum = min_tokens(Policy(), device, precision)
    source = "measured" if device.type == "cpu" else "assumed: not measured on GPUs yet"
    return f"By default calls of {minimum} tokens or more are rewritten on this device ({source})."
