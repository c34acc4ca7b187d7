"""`rewriting()`: the ambient policy, and the text that compiled graphs are guarded on.

The policy in force is the compile's own (its `options`) changed by every `rewriting` context around the call,
outermost first. Contexts live in a ContextVar, so threads and asyncio tasks never see each other's. A compiled graph
that holds attention carries a guard on `STATE.base_<digest>.token`, the text of the policy in force for its compile.
Equal policies give equal texts, so they share one compiled variant however they were written. A second guard is on
`STATE.reserved`: in an `sdpa_kernel` region around the call the user asked for one of torch's kernels.
"""

from __future__ import annotations

import contextvars
import functools
import hashlib
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, cast

import torch

from sparge_compile import dynamo
from sparge_compile.policy import Policy, replace

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Frame:
    """One entered context: the frame around it, what it changes, and the tokens already computed inside it."""

    __slots__ = ("context", "parent", "tokens")

    def __init__(self, parent: _Frame | None, context: rewriting) -> None:
        self.parent = parent
        self.context = context
        self.tokens: dict[str, str] = {}  # per base: a guard runs this on every call of compiled code

    def apply(self, base: Policy) -> Policy:
        return self.context.change(self.parent.apply(base) if self.parent else base)


def _without(frame: _Frame | None, context: rewriting) -> _Frame | None:
    """The frames less the innermost of `context`: contexts may be left out of order (a generator closed late)."""
    if frame is None or frame.context is context:
        return frame.parent if frame else None
    return _Frame(_without(frame.parent, context), frame.context)


_FRAME: contextvars.ContextVar[_Frame | None] = contextvars.ContextVar("sparge_rewriting", default=None)


def in_force(base: Policy) -> Policy:
    """`base` as changed by the contexts around the caller."""
    frame = _FRAME.get()
    return base if frame is None else frame.apply(base)


class _Base:
    """The policy of one or more compiles. TorchDynamo guards read `token`."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._key = policy.identity
        self._token = policy.token

    @property
    def token(self) -> str:
        frame = _FRAME.get()
        if frame is None:
            return self._token
        token = frame.tokens.get(self._key)
        if token is None:
            token = frame.tokens[self._key] = frame.apply(self._policy).token
        return token


class _State:
    """Holds one `base_<digest>` attribute for each distinct policy that something was compiled with."""

    @property
    def reserved(self) -> str:
        """Why attention called here and now must be torch's own whatever the policy says; an empty text if it need not.

        Compiled code asks on every call, so the usual answer comes first. Each choice of kernels has a text of its own:
        Inductor decomposes a dense call by the kernel that is allowed when it compiles.
        """
        is_forward_mode = dynamo.is_forward_mode()
        if dynamo.has_default_attention_kernels() and not is_forward_mode:
            return ""
        if is_forward_mode:
            return "forward-mode differentiation is active around the call, and the kernel has no derivative"
        return (
            "torch.nn.attention.sdpa_kernel or torch.backends.cuda.enable_..._sdp chooses among torch's kernels, only "
            f"these kernels: {_allowed_kernels()}; calls are rewritten where all are allowed, in torch's own order"
        )


def _allowed_kernels() -> str:
    cuda = torch.backends.cuda  # its settings hold for CPUs too
    names = ("flash", "mem_efficient", "math", "cudnn")
    return ", ".join(name for name in names if getattr(cuda, f"{name}_sdp_enabled")()) or "none"


STATE = _State()


def guard_on_policy_in_force(base: Policy) -> None:
    """Makes the graph being compiled valid only under the policy in force now."""
    # The digest makes the attribute name the same in every process, as a saved guard would need.
    name = f"base_{hashlib.sha256(base.identity.encode()).hexdigest()[:16]}"
    if not hasattr(STATE, name):
        setattr(STATE, name, _Base(base))
    dynamo.install_attribute_guard(__name__, "STATE", name, "token")


def guard_on_what_is_reserved() -> None:
    """Makes the graph being compiled valid only while `STATE.reserved` is what it is now."""
    dynamo.install_attribute_guard(__name__, "STATE", "reserved")


@torch.compiler.assume_constant_result  # so TorchDynamo runs it for real while it traces, and lets the error out
def _refuse_in_graphs() -> None:
    if dynamo.code_being_compiled() is rewriting.__init__.__code__:
        return  # called from a frame that runs eagerly
    raise AssertionError(
        "sparge_compile.rewriting(...) is inside compiled code, which has the policy around its call: enter it around "
        "the compiled model, or compile what runs inside it alone."
    )


class rewriting:
    """Context manager and decorator: the policy for everything compiled with the sparge backend that runs inside.

    `rewriting(policy)` replaces the policy whole; `rewriting(**fields)` changes these fields of the policy in force.
    `rewriting(enabled=False)` gives back the plain Inductor graph. Contexts nest, hold for the current thread or
    asyncio task only, and are undone when an exception leaves them. Each policy is compiled once and then cached.

    Enter it around compiled code, not inside: constructing one there is an error of torch's, and entering one that was
    built outside breaks the graph (an error under `fullgraph=True`).

    Raises:
        ValueError, TypeError: a field that does not exist or is out of range (when constructed, not when entered).
        TypeError: used to decorate a generator function, whose body would run outside the context.
    """

    def __init__(self, policy: Policy | None = None, **fields: Any) -> None:
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(f"rewriting({policy!r}): takes a sparge_compile.Policy, or its fields as keywords.")
        if torch.compiler.is_dynamo_compiling():
            _refuse_in_graphs()
        replace(policy or Policy(), fields)  # checks the fields now, where the traceback points at the mistake
        self._policy = policy
        self._fields = fields

    def change(self, policy: Policy) -> Policy:
        """The policy in force inside, given the one outside."""
        return replace(self._policy or policy, self._fields)

    def __enter__(self) -> None:
        _FRAME.set(_Frame(_FRAME.get(), self))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _FRAME.set(_without(_FRAME.get(), self))

    def __call__(self, function: _Function) -> _Function:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"rewriting() cannot decorate the generator function {function.__qualname__}: its body would run "
                "outside the context. Use `with rewriting(...)` inside it."
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return cast(_Function, call_async)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return cast(_Function, call)


dynamo.forbid_in_graphs(rewriting.__enter__, rewriting.__exit__)
