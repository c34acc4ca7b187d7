"""The model and device a profile was made for, and whether another is the same."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparge_compile import dynamo
from sparge_compile.profile_data import ModelFacts, Origin, ProfileError
from sparge_compile.site_names import module_named, split

_WARNED: set[tuple[str, str]] = set()


def model_facts(module: nn.Module) -> ModelFacts:
    """The facts of a module as it is now, seen through `torch.compile` and the wrappers of data parallelism."""
    original = _unwrapped(module)
    parameters = original.named_parameters(remove_duplicate=False)
    lines = sorted(f"{name.replace('_orig_mod.', '')} {list(value.shape)}" for name, value in parameters)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    kind = type(original)
    return ModelFacts(f"{kind.__module__}.{kind.__qualname__}", digest)


def _unwrapped(module: nn.Module) -> nn.Module:
    original: Any = dynamo.uncompiled(module)[0]
    while isinstance(original, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        original = dynamo.uncompiled(original.module)[0]
    return original


def device_name(device: torch.device) -> str:
    """A stable text for a device: "cpu AVX512", "NVIDIA H200"."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check_model(origin: Origin, module: nn.Module) -> None:
    """Is this module what a profile of this origin was made for? Nothing is checked where it says nothing.

    Raises:
        ProfileError: another class, or parameters of other names or shapes.
    """
    if origin.model is not None:
        facts = model_facts(module)
        if not _same_class(facts.name, origin.model.name):
            raise ProfileError(
                f"the profile was made for {origin.model.name}, the model is {facts.name}. Calibrate this model, or "
                "set the profile only around the model it is for (sparge_compile.rewriting). Blocks of a model "
                "that are compiled one by one get theirs with sparge_compile.attach(model, profile)."
            )
        if facts.parameters != origin.model.parameters:
            raise ProfileError(
                f"the profile was made for a {facts.name} whose parameters have other names or shapes (hash "
                f"{origin.model.parameters}, this one's is {facts.parameters}). Calibrate this model."
            )
    parameter = next(module.parameters(), None)
    if origin.device is not None and parameter is not None and parameter.device.type != "meta":
        _check_device(origin.device, device_name(parameter.device))


def warn_of_missing_sites(digest: str, sites: Iterable[str], module: nn.Module) -> None:
    """Warns, once for each profile (by its digest) and class, of sites whose module this one does not have."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    missing = [site for site in sites if module_named(module, split(site)[0]) is None]
    if missing and (digest, kind) not in _WARNED:
        _WARNED.add((digest, kind))
        warnings.warn(
            f"sparge: {type(module).__name__} has no module for {len(missing)} of the sites in its profile: "
            f"{', '.join(missing)}. Nothing gets their thresholds. Names are those in the module that is compiled; "
            "blocks compiled one by one get theirs with sparge_compile.attach(model, profile).",
            stacklevel=3,
        )


def _same_class(one: str, other: str) -> bool:
    """The same qualified name; a class of the script that runs is known by its name alone."""
    if "__main__" in (one.split(".")[0], other.split(".")[0]):
        return one.rsplit(".", 1)[-1] == other.rsplit(".", 1)[-1]
    return one == other


def _check_device(known: str, name: str) -> None:
    if name not in known.split(", ") and (known, name) not in _WARNED:
        _WARNED.add((known, name))
        warnings.warn(
            f"sparge: the profile was calibrated on {known}, the model is on {name}. Kernels of two devices round "
            "differently, so its errors were not measured here; calibrate there too and Profile.merge() the two.",
            stacklevel=3,
        )
