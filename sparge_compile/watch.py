"""Watching a model run: its graphs aside from other compiles, each site by its own name, calls outside every graph.

What `explain` and `calibrate` share.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparge_compile import context, dynamo
from sparge_compile.policy import Policy

OUTSIDE = "the call ran outside every compiled graph, after a graph break; TORCH_LOGS=graph_breaks shows where"
_SOFTMAX_OUTSIDE = (
    "A softmax ran outside every compiled graph at {}; if that is attention written out by hand, it stays as it is."
)
_NOT_WATCHED = "Calls outside compiled graphs are not listed: another profiler is active in this thread."

# The functions of torch that hold a whole attention, and the pattern that each one is in a graph.
_PATTERNS = {
    id(F.scaled_dot_product_attention): "sdpa",
    id(dynamo.FUSED_ENCODER_LAYER): "mha",
    id(dynamo.FUSED_MULTI_HEAD_ATTENTION): "mha",
}
_MULTI_HEAD_ATTENTION = F.multi_head_attention_forward.__code__
_NOT_USER_CODE = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


@contextlib.contextmanager
def run_aside(target: Callable[..., Any], backend: Callable[..., Any], policy: Policy) -> Iterator[Callable[..., Any]]:
    """`target` compiled with a TorchDynamo backend of ours, under `policy` and without gradients, to be run inside.

    The model, its own compiles and torch's limits on them are as before afterwards; what a backend raises comes out
    as it is.
    """
    with (
        torch.no_grad(),
        dynamo.not_compiled_in_place(target),
        dynamo.unwrapped_backend_errors(),
        context.rewriting(policy),
        dynamo.aside(target, backend) as compiled,
    ):
        yield compiled


class Watcher:
    """Knows the modules of a model that runs, and hears of attention calls that Python makes outside every graph."""

    def __init__(self, target: Callable[..., Any]) -> None:
        self._watching = True
        self._softmaxes: dict[str, None] = {}  # where they ran, in order
        modules = target.named_modules() if isinstance(target, nn.Module) else ()
        self._names = {module: name for name, module in modules}
        self._depth = 0  # of graphs running and compiles in progress: what Python calls there is not eager

    def name_of(self, site: str, traced_in: nn.Module | None, running: nn.Module | None) -> str:
        """A site's name in the module that runs it. Modules that share a graph share its trace, and the names in it."""
        before, now = ("" if module is None else self._names.get(module, "") for module in (traced_in, running))
        if before and now and (site + ".").startswith((before + ".", before + ":")):
            return now + site[len(before) :]
        return site

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the calls that are not listed."""
        if not self._watching:
            return (_NOT_WATCHED,)
        return tuple(_SOFTMAX_OUTSIDE.format(source) for source in self._softmaxes)

    def ran_outside(self, name: str, source: str, pattern: str) -> None:
        """An attention call ran outside every graph, in the module or function `name`; source is `file:line`."""

    @contextlib.contextmanager
    def inside_graph(self) -> Iterator[None]:
        """While a graph runs or is compiled."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def watching_eager_calls(self) -> Iterator[None]:
        """Sees every call of torch's attention functions that Python makes outside compiled graphs.

        A profiling hook is the only observer that changes nothing: a TorchFunctionMode alters the captured graph, and
        patching the function hides it from TorchDynamo. It is off while TorchDynamo traces and while graphs run.
        """
        if sys.getprofile() is not None:
            self._watching = False
            yield
            return
        with dynamo.compile_listeners(self._enter, self._leave):
            self._depth = 0
            sys.setprofile(self._see)
            try:
                yield
            finally:
                sys.setprofile(None)

    def _enter(self) -> None:
        self._depth += 1
        if self._watching:
            sys.setprofile(None)

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._watching:
            sys.setprofile(self._see)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code is _MULTI_HEAD_ATTENTION:
            self._call_outside(frame, "mha")
        elif event == "c_call":
            if frame.f_code is _MULTI_HEAD_ATTENTION or _is_called_by(frame, _MULTI_HEAD_ATTENTION):
                return  # part of a call that is listed
            pattern = _PATTERNS.get(id(argument))
            if pattern is not None:
                self._call_outside(frame, pattern)
            elif _is_softmax_of_scores(argument):
                self._softmaxes[_source(frame)] = None

    def _call_outside(self, frame: FrameType, pattern: str) -> None:
        owner = module_running(frame)
        name = frame.f_code.co_name if owner is None else self._names.get(owner) or type(owner).__name__
        self.ran_outside(name, _source(frame), pattern)


def _is_called_by(frame: FrameType, code: CodeType) -> bool:
    return frame.f_back is not None and frame.f_back.f_code is code


def _is_softmax_of_scores(function: Any) -> bool:
    """Is this a softmax that may be over a map of scores: not a method of a tensor with less than 3 dimensions?"""
    if getattr(function, "__name__", "") != "softmax":
        return False
    tensor = getattr(function, "__self__", None)
    return not isinstance(tensor, torch.Tensor) or tensor.dim() >= 3


def _source(frame: FrameType) -> str:
    """`file:line` of the innermost frame that is neither torch's nor ours; of `frame` itself if there is none."""
    user: FrameType | None = frame
    while user is not None and user.f_code.co_filename.startswith(_NOT_USER_CODE):
        user = user.f_back
    found = user or frame
    return f"{found.f_code.co_filename}:{found.f_lineno}"


def module_running(frame: FrameType | None) -> nn.Module | None:
    """The innermost module whose method is on the stack."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not isinstance(owner, fx.GraphModule):
            return owner
        frame = frame.f_back
    return None
