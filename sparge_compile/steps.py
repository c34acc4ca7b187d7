"""`dense_steps`: the first denoising steps of a diffusion pipeline stay dense."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any, Protocol

from sparge_compile.context import rewriting


class StepCallback(Protocol):
    """What diffusers takes as `callback_on_step_end`."""

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called at the end of each step, counted from 0."""


class dense_steps:
    """Keeps the first `count` denoising steps dense; those after them follow the policy in force.

        with sparge.dense_steps(5) as on_step_end:
            pipe(prompt, callback_on_step_end=on_step_end)

    A callback of your own calls `on_step_end(pipeline, step_index, timestep, callback_kwargs)` and goes on. Switching
    compiles nothing anew once the dense and the sparse variant exist. In a loop of your own, put
    `with sparge.rewriting(enabled=step >= count):` around the step instead.

    Enter it anew for each pipeline call: a callback cannot know that a step was the last, so in a second call inside
    one context the first step is sparse already. It then warns, and keeps the steps left of the first `count` dense.
    Like `rewriting` it holds for the current thread or task, in which the pipeline must call back.

    Args:
        count: how many steps stay dense, 0 or more.

    Raises:
        TypeError: count is not an integer.
        ValueError: count is negative.
    """

    def __init__(self, count: int) -> None:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(
                f"dense_steps({count!r}): takes the number of steps, an integer, not {type(count).__name__}."
            )
        if count < 0:
            raise ValueError(f"dense_steps({count}): the number of steps must be 0 or more.")
        self._count = count
        self._rewriting_off = rewriting(enabled=False)
        self._dense = False

    def __enter__(self) -> StepCallback:
        self._switch(dense=self._count > 0)
        return self._on_step_end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Here and not by `_switch`: a callback in another thread or task left the context there, not here.
        self._rewriting_off.__exit__(None, None, None)
        self._dense = False

    def _on_step_end(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if step_index == 0 and self._count > 0 and not self._dense:
            warnings.warn(
                "sparge: a second pipeline call inside one `with dense_steps(...)`: its first step was sparse. "
                "Enter dense_steps anew for each call.",
                stacklevel=2,
            )
        self._switch(dense=step_index + 1 < self._count)
        return callback_kwargs

    def _switch(self, *, dense: bool) -> None:
        if dense == self._dense:
            return
        self._dense = dense
        if dense:
            self._rewriting_off.__enter__()
        else:
            self._rewriting_off.__exit__(None, None, None)
