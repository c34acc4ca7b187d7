"""Watching a model run: its graphs aside from other compiles, each site by its own name, calls outside every graph.

What `explain` and `calibrate` share.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparge_compile import context, dynamo
from sparge_compile.policy import Policy

_OUTSIDE = "the call ran outside every compiled graph, after a graph break; TORCH_LOGS=graph_breaks shows where"
_PAST_THE_LIMIT = (
    "the call ran eagerly: torch had compiled as many variants of {} as torch.compiler.config.recompile_limit allows; "
    "TORCH_LOGS=recompiles says why there were so many"
)
_SOFTMAX_OUTSIDE = (
    "A softmax ran outside every compiled graph at {}; if that is attention written out by hand, it stays as it is."
)
_NOT_WATCHED = "Calls outside compiled graphs may be missing: another profiler was active in this thread."
NONE_SEEN = (
    "No attention call was seen. Outside compiled graphs, only Python's own calls of torch's attention are: not those "
    "that C code makes (functools.partial, map, TorchScript) or other threads, nor kernels of other libraries."
)

# The functions of torch that hold a whole attention, and the pattern that each one is in a graph.
_PATTERNS = {
    id(F.scaled_dot_product_attention): "sdpa",
    id(dynamo.FUSED_ENCODER_LAYER): "mha",
    id(dynamo.FUSED_MULTI_HEAD_ATTENTION): "mha",
}
_MULTI_HEAD_ATTENTION = F.multi_head_attention_forward.__code__
_OPERATOR_CALLS = (dynamo.OperatorPacket.__call__.__code__, dynamo.Operator.__call__.__code__)
_FUSED_LAYERS = tuple(layer.__name__ for layer in (dynamo.FUSED_ENCODER_LAYER, dynamo.FUSED_MULTI_HEAD_ATTENTION))
_RUNNERS = tuple(str(Path(__file__).with_name(name)) for name in ("explaining.py", "calibrating.py"))
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
        self._thread = threading.get_ident()
        self._until: tuple[FrameType, tuple[str, ...]] | None = None  # the events that end the call now running

    def name_of(self, site: str, traced_in: nn.Module | None, running: nn.Module | None) -> str:
        """A site's name in the module that runs it. Modules that share a graph share its trace, and the names in it."""
        before, now = ("" if module is None else self._names.get(module, "") for module in (traced_in, running))
        if before and now and (site + ".").startswith((before + ".", before + ":")):
            return now + site[len(before) :]
        return site

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the calls that are not listed."""
        softmaxes = tuple(_SOFTMAX_OUTSIDE.format(source) for source in self._softmaxes)
        return softmaxes if self._watching else (*softmaxes, _NOT_WATCHED)

    def ran_outside(self, name: str, source: str, pattern: str, reason: str) -> None:
        """An attention call ran outside every graph, in the module or function `name`; source is `file:line`.

        reason: why it was in none.
        """

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
                if self._depth == 0:
                    self._stop()
                self._until = None

    def _stop(self) -> None:
        """Takes our hook away; where the model set another, that one stays, and ours did not see everything."""
        if sys.getprofile() == self._see:
            sys.setprofile(None)
        else:
            self._watching = False

    def _enter(self) -> None:
        if threading.get_ident() == self._thread:
            self._depth += 1
            if self._depth == 1 and self._watching:
                self._stop()

    def _leave(self) -> None:
        if threading.get_ident() == self._thread:
            self._depth -= 1
            if self._depth == 0 and self._watching:
                sys.setprofile(self._see)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._until is not None:  # what an attention call does inside is part of it
            if frame is self._until[0] and event in self._until[1]:
                self._until = None
        elif event == "call" and frame.f_code is _MULTI_HEAD_ATTENTION:
            self._call_outside(frame, "mha")
            self._until = (frame, ("return",))
        elif event == "call" and frame.f_code in _OPERATOR_CALLS:
            pattern = _pattern_of_operator(frame.f_locals.get("self"))
            if pattern is not None:
                self._call_outside(frame.f_back or frame, pattern)
                self._until = (frame, ("return",))
        elif event == "c_call":
            pattern = _PATTERNS.get(id(argument))
            if pattern is not None:
                self._call_outside(frame, pattern)
            elif _is_softmax_of_scores(argument):
                self._softmaxes[_source(frame)] = None
            else:
                return
            self._until = (frame, ("c_return", "c_exception"))

    def _call_outside(self, frame: FrameType, pattern: str) -> None:
        owner = module_running(frame)
        name = frame.f_code.co_name if owner is None else self._names.get(owner) or type(owner).__name__
        self.ran_outside(name, _source(frame), pattern, _why_outside(frame))


def _why_outside(frame: FrameType) -> str:
    """A graph break, or code on the stack that torch compiles no more."""
    for caller in _frames_of_the_model(frame):
        if dynamo.variants_compiled(caller.f_code) >= dynamo.recompile_limit():
            return _PAST_THE_LIMIT.format(caller.f_code.co_name)
    return _OUTSIDE


def _pattern_of_operator(operator: Any) -> str | None:
    """What pattern a call of `torch.ops.aten`'s is, if it is an attention."""
    namespace, _, name = str(operator).partition(".")
    name = name.partition(".")[0]
    if namespace != "aten":
        return None
    if name in _FUSED_LAYERS:
        return "mha"
    return "sdpa" if name.lstrip("_").startswith("scaled_dot_product_") and "backward" not in name else None


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


def weakly(module: nn.Module | None) -> Callable[[], nn.Module | None]:
    """The module as long as it lives. TorchDynamo keeps what a backend returns, which so keeps no model alive."""
    return (lambda: None) if module is None else weakref.ref(module)


def module_running(frame: FrameType | None) -> nn.Module | None:
    """The innermost module whose method is on the stack, of those that `run_aside` runs."""
    for caller in _frames_of_the_model(frame):
        owner = caller.f_locals.get("self")
        if isinstance(owner, nn.Module) and not isinstance(owner, fx.GraphModule):
            return owner
    return None


def _frames_of_the_model(frame: FrameType | None) -> Iterator[FrameType]:
    """From `frame` outwards, up to what runs the model.

    Whoever called that is not looked at: it is no part of the model, and to read the locals of a frame keeps them alive
    until it returns.
    """
    while frame is not None and frame.f_code.co_filename not in _RUNNERS:
        yield frame
        frame = frame.f_back
