"""What models take and return: its parts by their place, copies of it, and two of them compared."""

from __future__ import annotations

import copy
import dataclasses
import enum
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparge_compile.testing.measures import Bounds, compare

_PLAIN = (numbers.Number, str, bytes, enum.Enum, type(None), torch.dtype, torch.device)


def parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Everything in a nest of tuples, lists, mappings and dataclasses that is none of these, by its place."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from parts(entry, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from parts(entry, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from parts(getattr(value, field.name), f"{name}.{field.name}")
    else:
        yield name, value


def tensors(value: Any, name: str) -> dict[str, Tensor]:
    """Every tensor among the parts."""
    return {place: part for place, part in parts(value, name) if isinstance(part, Tensor)}


def comparable(value: Any) -> dict[str, Any]:
    """The parts of what a model returns; TypeError if one cannot be compared, or if none is a tensor."""
    found = dict(parts(value, "output"))
    unknown = [
        f"{name} ({type(part).__name__})" for name, part in found.items() if not isinstance(part, (Tensor, *_PLAIN))
    ]
    if unknown:
        raise TypeError(
            f"the model returns what cannot be compared: {', '.join(unknown)}. Give a function around it that returns "
            "its tensors, in tuples, lists, mappings or dataclasses."
        )
    if not any(isinstance(part, Tensor) for part in found.values()):
        raise TypeError(f"the model returns {type(value).__name__}, in which there is no tensor to compare.")
    return found


def copied(value: Any) -> Any:
    """A deep copy, also of tensors that were computed from parameters and of random generators."""
    memo: dict[int, Any] = {}
    for _, part in parts(value, ""):
        if isinstance(part, Tensor) and not part.is_leaf:
            memo[id(part)] = copy.deepcopy(part.detach(), memo).requires_grad_()
        elif isinstance(part, torch.Generator):
            memo[id(part)] = part.clone_state()
    return copy.deepcopy(value, memo)


def difference(name: str, actual: Any, expected: Any, bounds: Bounds) -> str | None:
    """None if two parts agree within the bounds, else what is wrong."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return None if _same_plain(actual, expected, bounds) else f"{name} is {actual!r}, dense: {expected!r}."
    for what in ("dtype", "shape", "device"):
        if getattr(actual, what) != getattr(expected, what):
            return f"{name}: {what} is {getattr(actual, what)}, dense: {getattr(expected, what)}."
    if strides(actual) != strides(expected):
        return f"{name}: strides are {list(actual.stride())}, dense: {list(expected.stride())}."
    problem = compare(actual, expected, None, bounds, None)
    if problem is None:
        return None
    return (
        f"{name} {list(actual.shape)}: {problem}\nsparge.explain lists the attention calls; sparge.calibrate finds "
        "thresholds for a bound, Policy(dense=...) keeps calls dense, precision='none' does without INT8."
    )


def _same_plain(actual: Any, expected: Any, bounds: Bounds) -> bool:
    if type(actual) is not type(expected):
        return False
    if isinstance(expected, (float, complex)) and expected == expected:
        return actual == expected or abs(actual - expected) <= bounds.max_error * abs(expected)
    return bool(actual == expected) or (actual != actual and expected != expected)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Have they one shape, and the same bits in it?"""
    return x.shape == y.shape and torch.equal(_bytes(x), _bytes(y))


def _bytes(x: Tensor) -> Tensor:
    return x.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions along which anything moves."""
    return tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1) if x.numel() else ()
