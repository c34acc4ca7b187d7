"""A whole model, compiled with the backend, against itself run eagerly and densely."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparge_compile import context, dynamo
from sparge_compile.explain import explain
from sparge_compile.policy import Policy
from sparge_compile.testing.measures import Bounds
from sparge_compile.testing.values import comparable, copied, difference, same_bits, tensors
from sparge_kernels import ops

_TRAINING = "\nThe model is in training mode, where dropout differs from run to run: call eval() first."
_COMPILED_OTHERWISE = (
    "\nBut the model was compiled already, with another backend than sparge or for another policy: give it as it was "
    'before, or compile it with backend="sparge".'
)


def check_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reference: Callable[..., Any] | None,
    policy: Policy | None,
    bounds: Bounds,
) -> None:
    """What `assert_close_to_dense` does with a model."""
    target, _ = dynamo.uncompiled(model)
    buffers = _Buffers(target)
    try:
        problem = _compare_runs(model, target, (args, kwargs), reference, policy, bounds, buffers)
    finally:
        buffers.restore()
    if problem is not None:
        training = isinstance(target, nn.Module) and any(module.training for module in target.modules())
        raise AssertionError(problem + (_TRAINING if training else ""))


def _compare_runs(
    model: Callable[..., Any],
    target: Callable[..., Any],
    given: tuple[tuple[Any, ...], dict[str, Any]],
    reference: Callable[..., Any] | None,
    policy: Policy | None,
    bounds: Bounds,
    buffers: _Buffers,
) -> str | None:
    compiled = model if dynamo.is_compiled(model) else torch.compile(model, backend="sparge")
    dense_given, sparse_given, spare = (copied(given) for _ in range(3))
    with torch.no_grad(), context.rewriting(enabled=False), dynamo.not_compiled_in_place(target):
        expected = (reference or target)(*dense_given[0], **dense_given[1])
    wanted = copied(comparable(expected))  # it may be memory of a buffer
    of_dense = buffers.now()
    buffers.restore()
    with torch.no_grad(), _under(policy), ops.record_stats() as records:
        output = compiled(*sparse_given[0], **sparse_given[1])
    of_sparse = buffers.now()
    if not any(record.ran == "sparse" for record in records):
        buffers.restore()
        report = explain(model, *spare[0], policy=policy, timing=False, **spare[1])
        otherwise = _COMPILED_OTHERWISE if report.rewritten and dynamo.is_compiled(model) else ""
        return f"no attention call ran sparsely, so there is nothing to compare.\n{report}{otherwise}"
    actual = comparable(output)
    if wanted.keys() != actual.keys():
        return f"the model returns {', '.join(actual)}; run densely it returns {', '.join(wanted)}."
    problems = [difference(name, actual[name], x, bounds) for name, x in wanted.items()]
    problems += _written(
        tensors(given, "argument"), tensors(dense_given, "argument"), tensors(sparse_given, "argument"), bounds
    )
    if reference is None:
        problems += _written(buffers.before, of_dense, of_sparse, bounds)
    return next((problem for problem in problems if problem is not None), None)


def _under(policy: Policy | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if policy is None else context.rewriting(policy)


def _written(
    before: Mapping[str, Tensor], dense: Mapping[str, Tensor], sparse: Mapping[str, Tensor], bounds: Bounds
) -> list[str | None]:
    """What is wrong with tensors that a run may write to. Some are not in all: models take containers apart."""
    problems = []
    for name in dense:
        if name not in before or name not in sparse:
            continue
        if not same_bits(dense[name], before[name]):
            problems.append(difference(name, sparse[name], dense[name], bounds))
        elif not same_bits(sparse[name], before[name]):
            problems.append(f"{name}: the compiled model writes to it, the dense one does not.")
    return problems


class _Buffers:
    """The buffers of a module, which every run finds as they were at first; of a function, none."""

    def __init__(self, target: Callable[..., Any]) -> None:
        self._target = target
        modules = target.modules() if isinstance(target, nn.Module) else ()
        self._owners = [
            (module, name, buffer, buffer.clone())
            for module in modules
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self.before = self.now()

    def now(self) -> dict[str, Tensor]:
        """A copy of each."""
        named = self._target.named_buffers() if isinstance(self._target, nn.Module) else ()
        return {f"buffer {name!r}": buffer.clone() for name, buffer in named}

    def restore(self) -> None:
        with torch.no_grad():
            for module, name, buffer, content in self._owners:
                if not same_bits(buffer, content):
                    buffer.copy_(content)
                if getattr(module, name, None) is not buffer:
                    setattr(module, name, buffer)
