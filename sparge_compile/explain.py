"""`explain`: run a model once and report every attention call, rewritten or dense and why.

The model is traced as `torch.compile(model, backend="sparge")` would trace it and run on the rewritten graphs, without
Inductor: what is reported is what the compile does, sooner. Calls that ran eagerly, outside every compiled graph,
are seen by a profiling hook that watches Python call the attention function.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparge_compile import dynamo
from sparge_compile.backend import transform
from sparge_compile.context import rewriting
from sparge_compile.policy import Policy, split_options
from sparge_compile.report import Report, SiteReport
from sparge_kernels import ops

_OUTSIDE = "the call ran outside every compiled graph, after a graph break; torch._dynamo.explain shows the break"
_RECOMPILES = 64  # room for explain's own variants, so that it neither meets nor uses up torch's limit


def explain(model: Callable[..., Any], *args: Any, policy: Policy | None = None, **kwargs: Any) -> Report:
    """Runs `model(*args, **kwargs)` once, without gradients, and reports every attention call.

    Args:
        model: a module or function; compiled or not, it is left as it is.
        *args, **kwargs: what to call it with. The run has the side effects a call has (a cache is filled).
        policy: the policy to explain; None is the one in force here.

    Returns:
        A `Report`. Rewritten sites carry the density measured in this run, averaged over batch and heads.

    Raises:
        StrictPolicyError: the policy is strict and a call cannot be rewritten.
    """
    target, options = dynamo.uncompiled(model)
    base = split_options(options)[0] if policy is None else policy
    names = {module: name for name, module in target.named_modules()} if isinstance(target, nn.Module) else {}
    found: list[SiteReport] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        root = dynamo.root_module()
        found.extend(transform(gm, base, prefix=names.get(root, "") if root is not None else ""))
        return gm.forward

    watcher = _EagerCalls(names)
    with (
        torch.no_grad(),
        dynamo.more_recompiles(_RECOMPILES),
        dynamo.not_compiled_in_place(target),
        warnings.catch_warnings(),
        ops.record_stats() as records,
        dynamo.compile_listeners(watcher.pause, watcher.resume),
        watcher,
    ):
        warnings.simplefilter("ignore", UserWarning)
        compiled = torch.compile(target, backend=backend)
        if policy is None:
            compiled(*args, **kwargs)
        else:
            with rewriting(policy):
                compiled(*args, **kwargs)
    return Report((*_with_stats(found, records), *watcher.sites))


def _with_stats(sites: Sequence[SiteReport], records: Sequence[ops.StatsRecord]) -> list[SiteReport]:
    measured = []
    for site in sites:
        of_site = [record for record in records if record.site == site.name]
        if site.rewritten and of_site:
            density = torch.stack([record.density.mean() for record in of_site]).mean().item()
            pv_skipped = torch.stack([record.pv_skipped.mean() for record in of_site]).mean().item()
            site = replace(site, density=density, pv_skipped=pv_skipped)
        measured.append(site)
    return measured


class _EagerCalls:
    """Sees every call of the attention function that Python makes outside compiled graphs.

    A profiling hook is the only observer that changes nothing: a TorchFunctionMode alters the captured graph, and
    patching the function hides it from TorchDynamo. It is paused while TorchDynamo traces.
    """

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.sites: list[SiteReport] = []
        self._names = names
        self._before: Any = None
        self._pauses = 0

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        sys.setprofile(self._see)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def pause(self) -> None:
        self._pauses += 1
        sys.setprofile(self._before)

    def resume(self) -> None:
        self._pauses -= 1
        if self._pauses == 0:
            sys.setprofile(self._see)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and argument is F.scaled_dot_product_attention and not _in_graph(frame):
            site = self._describe(frame)
            if site not in self.sites:
                self.sites.append(site)

    def _describe(self, frame: FrameType) -> SiteReport:
        owner = _module_running(frame)
        name = frame.f_code.co_name if owner is None else self._names.get(owner) or type(owner).__name__
        source = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        return SiteReport(name, rewritten=False, reason=_OUTSIDE, source=source)


def _module_running(frame: FrameType) -> nn.Module | None:
    """The innermost module whose method is on the stack."""
    caller: FrameType | None = frame
    while caller is not None:
        owner = caller.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        caller = caller.f_back
    return None


def _in_graph(frame: FrameType) -> bool:
    """Is this the generated code of a graph, or torch's own code tracing or decomposing one?"""
    name = frame.f_code.co_filename
    return name.startswith("<eval_with_key>") or "/torch/_" in name.replace("\\", "/")
