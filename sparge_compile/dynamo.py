"""All that touches private names of torch, and nothing else; tests/compiler/test_dynamo.py has a canary for each.

What the rest of the compiler needs from TorchDynamo: install the policy guard, ask and guard facts about symbolic
sizes, know which `torch.compile` is compiling, hear when a compile starts and ends, and hand over to Inductor.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
import torch._dynamo.config
import torch._dynamo.eval_frame
from torch import fx, nn
from torch._dynamo import callback as _callback
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.source import AttrSource, GetItemSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Source, TracingContext
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import forward_ad as _forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint, statically_known_true

Size = int | torch.SymInt

Operator = torch._ops.OpOverload
OperatorPacket = torch._ops.OpOverloadPacket
HigherOrderOperator = torch._ops.HigherOrderOperator
FUSED_ENCODER_LAYER = torch._transformer_encoder_layer_fwd
FUSED_MULTI_HEAD_ATTENTION = torch._native_multi_head_attention
addmm_activation = torch._addmm_activation  # what the fused layer calls: on GPUs its gelu is the tanh approximation
int8_matmul = torch._int_mm  # int8 [M, K] x [K, N] -> int32
_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast

_ROOT_LOCAL = re.compile(r"""L\[['"](\w+(?:\[0\])?)['"]\]""")
_FIRST = "[0]"
_STACK_ENTRY = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def install_attribute_guard(module: str, *attributes: str) -> None:
    """Makes the graph being compiled valid only while `module.a.b...` equals what it is now.

    EQUALS_MATCH on a str: checked in C++ on every call of the compiled code, about 0.1 us.
    """
    source: Any = _translator().import_source(module)
    for attribute in attributes:
        source = AttrSource(source, attribute)
    install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))


def forbid_in_graphs(*callables: Any) -> None:
    """TorchDynamo refuses to trace these, with an error, instead of tracing them into a silent no-op."""
    for function in callables:
        function._dynamo_forbidden = True


def is_compiling_frame() -> bool:
    """True inside a backend that TorchDynamo called (and not, say, one called by hand on a GraphModule)."""
    try:
        return _translator() is not None and TracingContext.try_get() is not None
    except AttributeError:
        return False


def compile_owner() -> object | None:
    """The callable that `torch.compile` made for the compile in progress; one per call of `torch.compile`."""
    return _translator().output.compiler_fn if is_compiling_frame() else None


def code_being_compiled() -> CodeType | None:
    """The code object of the frame in progress: what torch's recompile limit counts variants of."""
    return _translator().output.root_tx.f_code if is_compiling_frame() else None


def root_module(path: str | None) -> nn.Module | None:
    """The module a node's path starts at: the local variable of the frame that the path names, else the frame's self.

    TorchDynamo records paths from the frame it traces. After a graph break that frame is a submodule's forward, or a
    continuation that holds the module in a variable of its own making.
    """
    name = root_local(path)
    module = _local(name) if is_compiling_frame() and name is not None else None
    return module if isinstance(module, nn.Module) else None


def root_local(path: str | None) -> str | None:
    """The name of that variable: the one in the path, else the frame's self or first argument if that is a module.

    `args[0]` is the first argument of a forward whose decorator takes `*args`.
    """
    named = _ROOT_LOCAL.match(path or "")
    if named:
        return named.group(1)
    if not is_compiling_frame():
        return None
    output = _translator().output
    code = output.root_tx.f_code
    candidates = ["self", *code.co_varnames[: min(code.co_argcount, 1)]]
    found = (name for name in candidates if isinstance(output.local_scope.get(name), nn.Module))
    return next(found, _self_in_varargs())


def _self_in_varargs() -> str | None:
    """`args[0]` where the frame is a module's forward of the kind `def wrapper(*args, **kwargs)`, a decorator's.

    Its continuation after a graph break has `args` as one of its variables.
    """
    output = _translator().output
    code = output.root_tx.f_code
    if code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX):
        names = [name + _FIRST for name in output.local_scope]
        return next((name for name in names if isinstance(_local(name), nn.Module)), None)
    if not code.co_flags & inspect.CO_VARARGS or code.co_argcount:
        return None
    name = code.co_varnames[code.co_kwonlyargcount] + _FIRST
    owner = _local(name)
    # Not any function of modules, `def run(*layers)`: there the first is one of many. An instance may have a forward of
    # its own around that of its class: one that is attached has.
    forwards = (getattr(owner, "forward", None), getattr(type(owner), "forward", None))
    is_forward = isinstance(owner, nn.Module) and any(getattr(one, "__code__", None) is code for one in forwards)
    return name if is_forward else None


def _local(name: str) -> Any:
    """What a local variable of the frame being compiled holds, or its first item."""
    value = _translator().output.local_scope.get(name.removesuffix(_FIRST))
    if not name.endswith(_FIRST):
        return value
    return value[0] if isinstance(value, tuple) and value else None


def _local_source(name: str) -> Source:
    """How a guard reads that."""
    source = LocalSource(name.removesuffix(_FIRST))
    return GetItemSource(source, 0) if name.endswith(_FIRST) else source


def module_in_local(name: str, path: str) -> nn.Module | None:
    """The module at a qualified path from the module in a local variable of the frame being compiled."""
    root = _local(name)
    try:
        return root.get_submodule(path) if isinstance(root, nn.Module) else None
    except AttributeError:
        return None


def guard_on_attribute_of_local(name: str, attribute: str) -> bool:
    """Has the module in this local variable an attribute of its own with this name? Guards the graph on the answer.

    An empty name stands for every module among the variables of the frame, the first item of a tuple included. The
    attribute's value is a text that never changes.
    """
    scope = _translator().output.local_scope
    modules = [other for other, value in scope.items() if isinstance(value, nn.Module)]
    firsts = [other + _FIRST for other in scope if isinstance(_local(other + _FIRST), nn.Module)]
    names = [name] if name else [*modules, *firsts]
    answers = [_guard_on_attribute(local, _local(local), attribute) for local in names]
    return any(answers)


def _guard_on_attribute(local: str, module: Any, attribute: str) -> bool:
    if not isinstance(module, nn.Module):
        return False
    source = _local_source(local)
    has = attribute in vars(module)
    if has:
        install_guard(AttrSource(source, attribute).make_guard(GuardBuilder.EQUALS_MATCH))
    else:
        absent = functools.partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr=attribute)
        install_guard(source.make_guard(absent))
    return has


def compiled_module() -> nn.Module | None:
    """The module that `torch.compile` was given, for the compile in progress; None for a function.

    It is not part of what a backend receives, so it is read off the stack, where `torch.compile`'s wrapper holds it.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename == torch._dynamo.eval_frame.__file__:
            function = frame.f_locals.get("fn")
            # A bound method; for torch's own containers, such as nn.Sequential, a function around the module.
            owner = getattr(function, "__self__", None) or _closure(function).get("fn")
            return owner if isinstance(owner, nn.Module) else None
        frame = frame.f_back
    return None


def uncompiled(model: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any] | None]:
    """(what a compiled module or function was made from, the `options` it was compiled with), or (model, None)."""
    carrier = model
    if isinstance(model, nn.Module) and not hasattr(model, "_orig_mod"):
        carrier = getattr(model, "_compiled_call_impl", None) or model  # compiled in place by module.compile()
        original: Any = model
    else:
        original = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", model)
    link = getattr(getattr(carrier, "dynamo_ctx", None), "callback", None) or _closure(carrier).get("callback")
    while link is not None and not hasattr(link, "kwargs"):
        link = getattr(link, "_torchdynamo_orig_backend", None)
    return original, getattr(link, "kwargs", {}).get("options")


def is_compiled(model: Callable[..., Any]) -> bool:
    """Has torch.compile made this function or module, or been applied to it or to a module in it?"""
    if not isinstance(model, nn.Module):
        return hasattr(model, "_torchdynamo_orig_callable")
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _closure(function: Any) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


@contextlib.contextmanager
def not_compiled_in_place(model: Any) -> Iterator[None]:
    """Undoes `module.compile()` inside the context: TorchDynamo would run that compile instead of the caller's."""
    compiled = getattr(model, "_compiled_call_impl", None) if isinstance(model, nn.Module) else None
    if compiled is None:
        yield
        return
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


def variants_compiled(code: CodeType) -> int:
    """How many variants of a code object count towards torch's limit, the one being compiled not counted.

    Compiles kept apart (`aside`, or `isolate_recompiles=True` of the user's) count for themselves.
    """
    if not ISOLATES:
        return len(_debug_get_cache_entry_list(code))
    region = torch._C._dynamo.eval_frame.get_eval_frame_isolate_recompiles_id()
    return len(torch._C._dynamo.eval_frame._get_cache_entries_for_region(code, region))


def recompile_limit() -> int:
    """How many variants of one code object TorchDynamo keeps before it silently runs eagerly."""
    return torch._dynamo.config.recompile_limit


ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # since torch 2.12 or 2.13


@contextlib.contextmanager
def aside(function: Callable[..., Any], backend: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """`function` compiled with `backend`, without using up the variants that torch allows other compiles of it.

    Torch 2.11 cannot keep compiles apart: there the limit is raised inside the context, and what was compiled counts.
    """
    if ISOLATES:
        isolated: dict[str, Any] = {"isolate_recompiles": True}
        yield torch.compile(function, backend=backend, **isolated)
        return
    config = torch._dynamo.config
    limits = {name: getattr(config, name) + 64 for name in ("recompile_limit", "accumulated_recompile_limit")}
    with config.patch(**limits):
        yield torch.compile(function, backend=backend)


@contextlib.contextmanager
def compile_listeners(start: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Calls `start` before and `end` after every TorchDynamo compile that happens inside the context."""

    def on_start(_: Any) -> None:
        start()

    def on_end(_: Any) -> None:
        end()

    handler = _callback.callback_handler
    handler.register_start_callback(on_start)
    handler.register_end_callback(on_end)
    try:
        yield
    finally:
        handler.remove_start_callback(on_start)
        handler.remove_end_callback(on_end)


def known(condition: bool | torch.SymBool) -> bool:
    """True if the condition holds for every size this graph may be called with. Adds no guard."""
    return statically_known_true(condition)


def guard(condition: bool | torch.SymBool) -> bool | None:
    """Decides a condition on sizes by the sizes at hand, and guards the graph on it.

    Returns None, adding no guard, where the caller gave a dimension bounds with `mark_dynamic(min=, max=)`: a guard
    that cuts those bounds raises ConstraintViolationError after the backend has returned. Likewise where the size
    depends on data.
    """
    if isinstance(condition, bool):
        return condition
    if known(condition):
        return True
    if known(torch.sym_not(condition)):
        return False
    if not condition.node.has_hint() or condition.node.expr.free_symbols & _bounded_symbols():
        return None
    return bool(condition)


def specialize(value: Any) -> Any:
    """A symbolic number as a plain one, guarded on it.

    None if it depends on data, or where the caller said with `mark_dynamic` that it changes: the guard would raise
    ConstraintViolationError after the backend has returned.
    """
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    node = value.node
    if node.expr.is_number:
        return node.pytype(node.expr)
    if not node.has_hint() or node.expr.free_symbols & _marked_symbols():
        return None
    return node.pytype(value)


def expression(size: Size) -> Any:
    """A size as something to compare without a guard: equal expressions are equal sizes."""
    return size if isinstance(size, int) else size.node.expr


def hint(size: Size) -> int | None:
    """The size at hand, without a guard; None where it depends on data."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None


def symbols(number: torch.SymInt | torch.SymFloat | torch.SymBool) -> dict[Any, int | None]:
    """The symbols of a symbolic number, each with its value at hand, None where that depends on data."""
    values = number.node.shape_env.backed_var_to_val
    return {symbol: int(values[symbol]) if symbol in values else None for symbol in number.node.expr.free_symbols}


def evaluated(number: torch.SymInt | torch.SymFloat | torch.SymBool, values: dict[Any, int]) -> int | float | bool:
    """A symbolic number with numbers in place of its symbols. Adds no guard."""
    return number.node.pytype(number.node.expr.xreplace(values))


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Inside, operations compute numbers, whatever modes the caller of the compiled function has set."""
    with unset_fake_temporarily(), torch._C.DisableTorchFunction():
        yield


def physical_layout(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest in memory (as `torch.empty_permuted` takes them), by the hints."""
    strides = [hint(stride) or 0 for stride in tensor.stride()]
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))


def module_path(node: fx.Node) -> tuple[str, str] | None:
    """(path as TorchDynamo writes it, class name) of the innermost module a node was traced in.

    The start of the path is one local variable: `L['args'][0]` of `_self_in_varargs` is written `L['args[0]']`.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, owner = list(stack.values())[-1]
    path, first = str(path), _self_in_varargs() if is_compiling_frame() else None
    if first is not None:
        name = first.removesuffix(_FIRST)
        path = re.sub(rf"""^L\[(['"]){name}\1\]\[0\]""", f"L['{first}']", path)
    return path, owner.__name__ if isinstance(owner, type) else str(owner).rsplit(".", 1)[-1]


def user_frame(node: fx.Node) -> tuple[str, int, str] | None:
    """(file, line, function) of the innermost user frame a node was traced in."""
    entries = _STACK_ENTRY.findall(node.meta.get("stack_trace") or node.stack_trace or "")
    return (entries[-1][0], int(entries[-1][1]), entries[-1][2]) if entries else None


def example(node: fx.Node) -> Any:
    """The fake tensor or symbolic number that TorchDynamo computed for a node; None if it has none."""
    return node.meta.get("example_value")


def set_example(node: fx.Node, value: Any) -> None:
    """Records the fake value of a node that we inserted."""
    node.meta["example_value"] = value


def storage(node: fx.Node) -> int | None:
    """What memory a node's tensor lies in: equal for two nodes that share it; None if it is no tensor."""
    value = example(node)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) and is_plain(value) else None


def is_plain(tensor: torch.Tensor) -> bool:
    """Is this a dense tensor of the graph, and not a subclass of the user's, a nested or a sparse tensor?"""
    return isinstance(tensor, FakeTensor) and tensor.layout == torch.strided


def written_out(node: fx.Node, function: Callable[..., Any], fakes: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The graph of ATen operations that `function` runs on these tensors of a graph, in the place of `node`.

    Traced above autograd and autocast, so that scaled_dot_product_attention stays one node; without gradients.
    """
    caches = torch.is_autocast_cache_enabled()
    with contextlib.ExitStack() as state:
        state.enter_context(torch.no_grad())
        for device, dtype, enabled in autocast_regions(node):
            state.enter_context(torch.autocast(device, dtype, enabled))
        torch.set_autocast_cache_enabled(False)  # it would keep casts of fake weights
        state.callback(torch.set_autocast_cache_enabled, caches)
        for mode in {fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)}:
            state.enter_context(mode)  # what the function creates must be fake too
        module: fx.GraphModule = make_fx(function, pre_dispatch=True)(*fakes)
    for inner in module.graph.nodes:
        set_example(inner, inner.meta.get("val"))
    return module


def autocast_regions(node: fx.Node) -> list[tuple[Any, ...]]:
    """(device, dtype, enabled) of the autocast regions that are open where a node stands, outermost first."""
    regions: dict[fx.Node, tuple[Any, ...]] = {}
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        if earlier.target is _ENTER_AUTOCAST:
            regions[earlier] = earlier.args[:3]
        elif earlier.target is _EXIT_AUTOCAST:
            regions.pop(earlier.args[0], None)
    return list(regions.values())


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    """Inductor exactly as `torch.compile(backend="inductor", mode=, options=)` would call it, checks included.

    Raises:
        RuntimeError: an unknown mode or option. A custom backend gets both unvalidated, and "default" never arrives.
    """
    return torch._TorchCompileInductorWrapper(mode, options, None)(gm, example_inputs)


@contextlib.contextmanager
def unwrapped_backend_errors() -> Iterator[None]:
    """What a backend raises, without the BackendCompilerFailed that TorchDynamo puts around it."""
    try:
        yield
    except BackendCompilerFailed as failed:
        raise failed.inner_exception from None


def inductor_cache_folder() -> str:
    """Where Inductor keeps what it compiles; it need not exist."""
    from torch._inductor.runtime import cache_dir_utils

    return os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache_dir_utils.default_cache_dir()


_KERNEL_ORDER = torch._C._get_sdp_priority_order()


def has_default_attention_kernels() -> bool:
    """May scaled_dot_product_attention choose among all its kernels, in the order torch starts with?

    torch.backends.cuda asks the same; compiled code asks on every call, and its functions take thrice as long.
    """
    return (
        torch._C._get_flash_sdp_enabled()
        and torch._C._get_mem_efficient_sdp_enabled()
        and torch._C._get_math_sdp_enabled()
        and torch._C._get_cudnn_sdp_enabled()
        and torch._C._get_sdp_priority_order() == _KERNEL_ORDER
    )


def is_transforming() -> bool:
    """Is a functorch transform (vmap, grad, jvp) or forward-mode differentiation active in this thread?"""
    return torch._C._functorch.maybe_current_level() is not None or is_forward_mode()


def is_forward_mode() -> bool:
    """Is forward-mode differentiation active? TorchDynamo's guards do not ask."""
    return _forward_ad._current_level >= 0


def is_traced_for_a_backend() -> bool:
    """For code that TorchDynamo traces: is this a compile, and not an export? False in code that runs."""
    # Not torch.compiler.is_exporting(): tracing with torch 2.11 takes it for True.
    return torch.compiler.is_dynamo_compiling() and not torch.compiler._is_exporting_flag


def _translator() -> Any:
    return InstructionTranslator.current_tx()


def _bounded_symbols() -> set[Any]:
    """Symbols of dimensions that the caller bounded with `mark_dynamic(min=, max=)`."""
    return _constrained_symbols(lambda constraint: isinstance(constraint, StrictMinMaxConstraint))


def _marked_symbols() -> set[Any]:
    """Symbols of dimensions that the caller marked with `mark_dynamic`, with bounds or without."""
    return _constrained_symbols(lambda constraint: not getattr(constraint, "warn_only", True))


def _constrained_symbols(counts: Callable[[Any], bool]) -> set[Any]:
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None or context.fake_mode.shape_env is None:
        return set()
    symbols: set[Any] = set()
    for tracked in context.fake_mode.shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for size, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            if counts(constraint) and isinstance(size, torch.SymInt):
                symbols |= size.node.expr.free_symbols
    return symbols
