"""How far an output is from dense, as a whole and in its worst row, and how to say so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What rounding to bf16 does to a number, as a share of it: smaller errors of a tensor tell nothing, whatever the
# lengths, and a single row may have twice that. Beside |o|, which shrinks as 1 / sqrt(keys), a larger floor would hide
# rows that nobody wrote.
_ROUNDING = 2.0**-9


def _few_in_tensor(numbers: int) -> float:
    """What a tensor of few numbers may add: a mean of few is no mean (seen of INT8: 3.9 roundings of 12 numbers)."""
    return 1 + 40 / max(numbers, 1)


def _few_in_row(numbers: int) -> float:
    """What a row of few numbers may add: one often cancels to nothing (seen of INT8: 10 roundings), 64 never do."""
    return 1 + 8 / max(numbers, 1)


@dataclass(frozen=True)
class Bounds:
    """`max_error` and `max_row_error` as in `assert_close_to_dense`."""

    max_error: float
    max_row_error: float


def compare(
    output: Tensor,
    expected: Tensor,
    magnitude: Tensor | None,
    bounds: Bounds,
    dimensions: tuple[str, ...] | None,
) -> str | None:
    """None if the two agree within the bounds, else what is wrong, as a sentence or two.

    Args:
        output, expected: [..., rows, dim]; of integers, a share may differ.
        magnitude: what the output is made of, of the same shape: errors of a rounding of it are never at fault.
            None: rows within max_error of the mean row are not.
        dimensions: names of the leading dimensions for the text; None: numbers.
    """
    if output.shape != expected.shape:
        return f"the shape is {list(output.shape)}, that of dense is {list(expected.shape)}."
    if expected.is_complex():
        output, expected = (torch.view_as_real(x.resolve_conj()).flatten(-2) for x in (output, expected))
    if not expected.dtype.is_floating_point:
        differing = int((output != expected).sum())
        if differing <= bounds.max_error * output.numel():
            return None
        return f"{differing} of {output.numel()} numbers differ from dense (allowed: max_error={bounds.max_error:g})."
    if output.numel() == 0:
        return None
    if output.dim() == 0:
        output, expected = output[None], expected[None]
    actual, wanted = output.double(), expected.double()
    problem = _compare_non_finite(actual, wanted, dimensions)
    if problem is not None:
        return problem
    compared = wanted.isfinite() & actual.isfinite()
    difference = (actual - wanted).masked_fill(~compared, 0.0).abs()
    wanted = wanted.masked_fill(~compared, 0.0)
    if magnitude is None:
        floor = bounds.max_error * torch.linalg.vector_norm(wanted, dim=-1).mean()
        made_of = torch.zeros_like(wanted)
    else:
        made_of = magnitude.double().abs().masked_fill(~compared, 0.0)
        made_of = made_of.masked_fill(~made_of.isfinite(), 0.0)
        share = min(bounds.max_error, 2 * _ROUNDING) * _few_in_row(wanted.shape[-1])
        floor = share * torch.linalg.vector_norm(made_of, dim=-1)
    share = min(bounds.max_error, _ROUNDING) * _few_in_tensor(wanted.numel())
    allowed = max(bounds.max_error * wanted.abs().sum(), share * made_of.sum())
    actual = actual.masked_fill(~compared, 0.0)
    return _compare_finite(actual, wanted, difference, float(allowed), floor, bounds, dimensions)


def _compare_finite(
    actual: Tensor,
    wanted: Tensor,
    difference: Tensor,
    allowed_in_all: float,
    floor: Tensor,
    bounds: Bounds,
    dimensions: tuple[str, ...] | None,
) -> str | None:
    error = float(difference.sum())
    row_difference = torch.linalg.vector_norm(difference, dim=-1)
    row_size = torch.linalg.vector_norm(wanted, dim=-1)
    allowed = torch.maximum(bounds.max_row_error * row_size, floor)
    excess = row_difference - allowed
    wrong = int((excess > 0).sum())
    if error <= allowed_in_all and not wrong:
        return None
    worst = int((row_difference / allowed.clamp(min=1e-300)).argmax())
    size, off, most = (float(x.flatten()[worst]) for x in (row_size, row_difference, allowed))
    here, there = (x.reshape(-1, x.shape[-1])[worst] for x in (actual, wanted))
    cosine = float(torch.nn.functional.cosine_similarity(here, there, dim=0))
    return (
        f"the error is {error / max(float(wanted.abs().sum()), 1e-300):.3g} of the output (allowed: "
        f"max_error={bounds.max_error:g}, or a rounding of what it is made of), and {wrong} of {row_size.numel()} rows "
        f"are too far off. The worst, {_place(worst, row_size.shape, dimensions)}, is off by {off:.3g} where dense has "
        f"{size:.3g} (cosine {cosine:.3g}; allowed: {most:.3g}; max_row_error={bounds.max_row_error:g})."
    )


def _compare_non_finite(actual: Tensor, wanted: Tensor, dimensions: tuple[str, ...] | None) -> str | None:
    for name, kind in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = kind(actual) != kind(wanted)
        if wrong.any():
            rows = wrong.any(-1)
            row = int(rows.flatten().float().argmax())
            here, there = int(kind(actual).sum()), int(kind(wanted).sum())
            return (
                f"{here} numbers are {name}, {there} in dense; {int(rows.sum())} rows differ, the first is "
                f"{_place(row, rows.shape, dimensions)}."
            )
    return None


def _place(row: int, shape: torch.Size, dimensions: tuple[str, ...] | None) -> str:
    """The index of a row in words."""
    index = []
    for size in reversed(shape):
        index.append(row % size)
        row //= size
    index.reverse()
    if not index:
        return "the only row"
    if dimensions is None or len(dimensions) != len(index):
        return f"row {index}"
    return ", ".join(f"{name} {number}" for name, number in zip(dimensions, index, strict=True))
