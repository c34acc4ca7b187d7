"""What a measurement means, in words: a gain, no gain, or why nothing can be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sparge_compile.bench.problem import Problem
from sparge_compile.bench.rows import Gain, Row
from sparge_compile.bench.timing import FEWEST_ROUNDS
from sparge_compile.policy import Policy
from sparge_compile.thresholds import min_tokens
from sparge_kernels import ops

Outcome = Literal["gain", "unclear", "no gain", "gate failed", "failed", "not measured"]


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
    tokens = rows[0].tokens
    broken = next((row for row in rows if row.failed and row.is_ours), None)
    if broken is not None:
        outcome: Outcome = "gate failed" if broken.trouble == "gate failed" else "failed"
        what = "Accuracy gate failed" if outcome == "gate failed" else "Failed"
        of = f"{broken.variant}, {thresholds(broken)}"
        words = f"{what} at {tokens} tokens ({of}): {broken.note}. Nothing was timed."
        return Verdict(tokens, outcome, words, left_dense=kept)
    ours = next((row for row in rows if row.is_ours and row.choice == choice), None)
    baseline = next((row for row in rows if row.is_baseline), None)
    if ours is None or ours.gain is None or baseline is None:
        words = f"Not measured at {tokens} tokens: {_why_not(rows, ours)}."
        return Verdict(tokens, "not measured", words, left_dense=kept)
    words = _sentence(ours.gain, ours, baseline, "this size" if only_size else f"{tokens} tokens")
    return Verdict(tokens, ours.gain, f"{words} {_by_default(ours.gain, kept)}".strip(), ours.ratio, kept)


def _why_not(rows: Sequence[Row], ours: Row | None) -> str:
    if ours is not None and ours.trouble is not None:
        return ours.note
    dense = [row for row in rows if row.is_dense]
    wrong = next((row for row in dense if row.trouble == "gate failed"), None)
    if wrong is not None and all(row.trouble for row in dense):
        return (
            f"dense attention itself does not pass its check ({wrong.variant}: {wrong.note}), so the inputs are at "
            "fault: look for inf, NaN and huge numbers in q, k and v"
        )
    reasons = "; ".join(f"{row.variant}: {row.note}" for row in dense if row.trouble)
    return f"no dense peer could be timed ({reasons})" if reasons else "no dense peer could be timed"


def times(ratio: float) -> str:
    """A ratio with as many digits as mean something."""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}"


def thresholds(row: Row) -> str:
    """Which tiles a row of ours computes, in a sentence."""
    if row.density_asked is not None:
        return "all tiles" if row.density_asked == 1 else f"{row.density_asked:g} of the tiles"
    return "default thresholds" if row.choice == "default" else row.choice


def _sentence(gain: Gain, ours: Row, baseline: Row, size: str) -> str:
    assert ours.ratio is not None and ours.ratio_low is not None and ours.ratio_high is not None
    assert ours.relative_l1 is not None and ours.worst_cosine is not None and ours.density is not None
    speed = f"{times(ours.ratio)} times as fast as the fastest dense peer ({baseline.variant})"
    count = f"{ours.rounds} round{'s' if ours.rounds > 1 else ''}"
    spread = f"{times(ours.ratio_low)} to {times(ours.ratio_high)} in the middle half of {count}"
    computed = (
        f"{thresholds(ours)}, {ours.density:.0%} of the tiles computed, relative L1 {ours.relative_l1:.2g}, worst "
        f"row's cosine {ours.worst_cosine:.3f}"
    )
    if gain == "gain":
        return f"At {size}: {speed}, {spread} ({computed})."
    if gain == "no gain":
        return f"No gain at {size}: {speed}, {spread} ({computed})."
    if ours.rounds < FEWEST_ROUNDS:
        return f"No clear gain at {size}: {speed}, but in {count} only, which is too few to tell ({computed})."
    return f"No clear gain at {size}: {speed}, but {spread}, which is noise ({computed})."


def _by_default(gain: Gain, kept: str | None) -> str:
    if gain == "gain":
        return "" if kept is None else f"But a compiled model leaves such a call dense by default: {kept}."
    if kept is not None:
        return "A compiled model leaves such a call dense by default."
    if gain == "unclear":
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


def default_minimum(device: torch.device, dtype: torch.dtype, precision: str) -> str:
    """What the backend does without being asked, in words."""
    reason = ops.unmeasured(device, dtype, precision)
    if reason is not None:
        return f"By default calls in {str(dtype).removeprefix('torch.')} stay dense here: {reason}."
    source = "measured on another CPU" if device.type == "cpu" else "assumed, as no GPU was measured yet"
    minimum = min_tokens(Policy(), device, precision)
    return f"By default calls of {minimum} tokens or more are rewritten here (a length {source})."
