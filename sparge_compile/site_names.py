"""What a site's name says: which module of a model, and which of its calls."""

from __future__ import annotations

from torch import nn

from sparge_compile import dynamo


def split(site: str) -> tuple[str, int]:
    """`blocks.3.attn1:2` as ("blocks.3.attn1", 2); without a number the call is 0, the only one."""
    base, _, number = site.rpartition(":")
    return (base, int(number)) if base and number.isdecimal() else (site, 0)


def module_named(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that qualified name; the model itself is called by its class."""
    try:
        return dynamo.uncompiled(model.get_submodule(name))[0]  # type: ignore[return-value]
    except AttributeError:
        return model if name == type(model).__name__ else None
