"""`attach`: a profile's thresholds on the modules themselves, so that blocks which share one graph keep their own.

Compiled block by block (`block.compile()`, diffusers' `compile_repeated_blocks`) equal blocks share one graph and one
set of site names, so constants in the graph cannot tell them apart. An attached module holds its thresholds in buffers
and marks them when it is traced; markers.py takes it from there.

The mark is made by a `forward` put on the instance, not by a forward pre-hook: TorchDynamo traces a hook of the very
module that is compiled as a graph of its own, which the attention call never sees, and it does not guard on hooks, so a
model compiled before would go on as if nothing had been attached (both seen, 2.11 to 2.15).
"""

from __future__ import annotations

import os
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import update_wrapper
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparge_compile import dynamo
from sparge_compile.markers import PREFIX, STATE, mark
from sparge_compile.profile import Profile, ProfileError
from sparge_compile.site_names import module_named, split
from sparge_kernels.thresholds import FIELDS, Thresholds, pack, unpack

_REPLACED = "_sparge_forward"  # the forward an attached instance had of its own; None if its class's
_Plan = dict[nn.Module, dict[int, tuple[Thresholds, ...]]]


def attach(model: nn.Module, profile: Profile | str | os.PathLike[str]) -> Attachment:
    """Gives every module that a profile names its own thresholds, for compiles with the sparge backend.

    They win over the thresholds of any policy, `Policy(profile=...)` included; all else stays the policy's. Needed for
    blocks compiled one by one; a model compiled whole gives the same results with `Policy(profile=...)`. Models that
    run uncompiled, under another backend or through torch.export are not affected. Attach before or after compiling;
    each module's next call compiles anew, once for all blocks whose profile entries are alike in number.

    Args:
        model: the whole model that the profile was made from; its blocks may be compiled already.
        profile: a `Profile` or the path of one.

    Returns:
        An `Attachment`, which undoes it: `.detach()`, or use it as a context manager.

    Raises:
        ProfileError: the profile cannot be read, names modules that the model does not have (it was made from another
            model) or names one module twice; the model is left as it was.
        RuntimeError: a module has a profile attached already (detach it, or `update` it: of two, neither can be said
            to be the one meant), or is on the meta device.
    """
    target = dynamo.uncompiled(model)[0]
    if not isinstance(target, nn.Module):
        raise TypeError(f"attach({model!r}): takes the nn.Module that the profile was made from.")
    loaded = _loaded(profile)
    plan = _plan(target, loaded)
    for module, calls in plan.items():
        _check_free(module, calls)
    tables = {
        (module, f"{PREFIX}{call}"): _table(entries, _device(module, target))
        for module, calls in plan.items()
        for call, entries in calls.items()
    }
    for (module, name), table in tables.items():
        module.register_buffer(name, table, persistent=False)
    for module in plan:
        _put_forward(module, loaded.predictor)
    return Attachment(target, plan)


class Attachment:
    """Thresholds attached to a model's modules. As a context manager it detaches on the way out."""

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._model = model
        self._modules = list(modules)

    @classmethod
    def of(cls, model: nn.Module) -> Attachment:
        """All that is attached to a model, by whatever calls: a copy of an attached model is attached too."""
        return cls(model, (module for module in model.modules() if STATE in vars(module)))

    def update(self, profile: Profile | str | os.PathLike[str]) -> None:
        """Replaces the numbers by another profile's, in place: nothing is compiled anew.

        Raises:
            ProfileError: it names other sites than the attached profile, or another number of heads for one of them.
            RuntimeError: nothing is attached any more.
        """
        loaded = _loaded(profile)
        plan = _plan(self._model, loaded)
        old = {(module, name): table for module in self._modules for name, table in _tables(module).items()}
        new = {
            (module, f"{PREFIX}{call}"): _table(entries, torch.device("cpu"))
            for module, calls in plan.items()
            for call, entries in calls.items()
        }
        if not old:
            raise RuntimeError("nothing is attached any more; attach the profile instead.")
        if {vars(module)[STATE] for module in self._modules} != {loaded.predictor}:
            raise ProfileError("the profile is for another predictor than the one attached; detach that one first.")
        if {key: table.shape for key, table in old.items()} != {key: table.shape for key, table in new.items()}:
            raise ProfileError(
                "the profile names other sites, or other numbers of heads, than the one attached; detach that one and "
                "attach this one."
            )
        for key, table in old.items():
            table.copy_(new[key])

    def detach(self) -> None:
        """Makes the modules what they were before. Doing it twice does nothing."""
        for module in self._modules:
            _detach(module)
        self._modules = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attached_thresholds(model: Any, site: str) -> tuple[Thresholds, ...]:
    """What is attached for a site of a model now: one entry, or one per query head; empty if nothing is."""
    base, call = split(site)
    module = module_named(model, base) if isinstance(model, nn.Module) else None
    table = None if module is None else _tables(module).get(f"{PREFIX}{call}")
    if table is None or table.dtype != torch.int64:
        return ()
    return tuple(unpack(tuple(table.view(torch.float64).flatten().tolist()), table.shape[0]))


def _loaded(profile: Any) -> Profile:
    if isinstance(profile, Profile):
        return profile
    if isinstance(profile, (str, os.PathLike)):
        return Profile.load(profile)
    raise TypeError(f"profile={profile!r}: must be a Profile or the path of one, not {type(profile).__name__}.")


def _plan(model: nn.Module, profile: Profile) -> _Plan:
    """Each module with the entries of its calls; checks everything, changes nothing."""
    profile.check_model(model)
    plan: _Plan = {}
    names: dict[nn.Module, str] = {}
    missing = []
    for site, entries in {**profile.sites, **dict.fromkeys(profile.dense, ())}.items():
        base, call = split(site)
        module = module_named(model, base)
        if module is None:
            missing.append(site)
            continue
        if names.setdefault(module, base) != base:
            raise ProfileError(f"the profile names one module twice, as {names[module]!r} and {base!r}.")
        plan.setdefault(module, {})[call] = entries
    if missing:
        raise ProfileError(
            f"the profile was made from another model: {type(model).__name__} has no module for {len(missing)} of its "
            f"{len(profile.sites)} sites: {', '.join(missing)}."
        )
    for module, calls in plan.items():
        if 0 in calls and len(calls) > 1:
            base = names[module]
            raise ProfileError(f"the profile names {base!r} as one call and, as '{base}:{max(calls)}', as several.")
    return plan


def _check_free(module: nn.Module, calls: Mapping[int, Any]) -> None:
    if getattr(module, STATE, None) is not None:
        raise RuntimeError(
            f"a {type(module).__name__} that the profile names has one attached already: detach that "
            "(Attachment.of(model).detach() finds all that a model has), or update() it."
        )


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers(), *model.parameters()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        raise RuntimeError(f"a {type(module).__name__} is on the meta device; load its weights before attaching.")
    return device


def _table(entries: Sequence[Thresholds], device: torch.device) -> Tensor:
    """int64 [entries, 4]: the bits of fp64 numbers. A cast of the model's floating-point tensors leaves them alone."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be updated outside it
        numbers = torch.tensor(pack(entries), dtype=torch.float64, device="cpu").view(len(entries), FIELDS)
        return numbers.view(torch.int64).to(device)


def _tables(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name.startswith(PREFIX)}


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Marks the module's tables when traced for a backend, then does what the module's forward does."""
    if dynamo.is_traced_for_a_backend():
        for name, table in self._buffers.items():
            if name.startswith(PREFIX):
                mark(table, int(name[len(PREFIX) :]), self._sparge_attached)  # `STATE`
    replaced: Any = self._sparge_forward  # `_REPLACED`
    if replaced is not None:
        return replaced(*args, **kwargs)
    return type(self).forward(self, *args, **kwargs)


_FORWARDS: weakref.WeakKeyDictionary[type, Callable[..., Any]] = weakref.WeakKeyDictionary()


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """`_forward` for one class, with a code object of its own: torch counts compiled variants by code object."""
    if cls not in _FORWARDS:
        code = _forward.__code__.replace(co_name=f"{cls.__name__}.forward")
        function = types.FunctionType(code, globals(), "forward")
        _FORWARDS[cls] = update_wrapper(function, cls.forward, updated=())
    return _FORWARDS[cls]


def _put_forward(module: nn.Module, predictor: str) -> None:
    own = vars(module)
    own[STATE] = predictor
    if _REPLACED not in own:  # else ours is still there, under a forward that was put on it before `detach`
        own[_REPLACED] = own.get("forward")
        own["forward"] = types.MethodType(_forward_of(type(module)), module)


def _detach(module: nn.Module) -> None:
    for name in _tables(module):
        delattr(module, name)
    own = vars(module)
    own.pop(STATE, None)
    if own.get("forward") == types.MethodType(type(module).forward, module):  # unpickled: ours comes back as this
        del own["forward"]
        own.pop(_REPLACED, None)
        return
    if getattr(own.get("forward"), "__func__", None) not in list(_FORWARDS.values()):
        return  # another library put its own forward on ours: ours stays, and marks nothing
    del own["forward"]
    replaced = own.pop(_REPLACED, None)
    if replaced is not None:
        own["forward"] = replaced
