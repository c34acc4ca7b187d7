"""What a model computes in eager mode: its attention calls in the order it makes them, and what if they were others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from zoo_entry import Call, Entry


@dataclass(frozen=True)
class EagerCall:
    """One attention call as the model made it.

    Attributes:
        pattern: `sdpa`, `mha` (F.multi_head_attention_forward) or `softmax` (over a map of scores).
        heads, head_dim: None where the call does not show them.
    """

    pattern: str
    q_len: int
    k_len: int
    heads: int | None = None
    head_dim: int | None = None
    masked: bool = False


@dataclass
class WatchAttention(TorchFunctionMode):
    """Records every attention call inside.

    The mode keeps the modules of torch.nn off their fused fast paths. `instead` maps patterns to what runs in place of
    their calls, given the function and its arguments.
    """

    instead: dict[str, Callable[..., Any]] = field(default_factory=dict)
    calls: list[EagerCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = _read(function, args, kwargs)
        if call is None:
            return function(*args, **kwargs)
        self.calls.append(call)
        if call.pattern not in self.instead:
            return function(*args, **kwargs)
        return self.instead[call.pattern](function, *args, **kwargs)


def eager(call: Call, instead: dict[str, Callable[..., Any]] | None = None) -> tuple[list[Tensor], list[EagerCall]]:
    """(the outputs, the attention calls on the way there)."""
    with torch.no_grad(), WatchAttention(instead or {}) as watch:
        return call.run(), watch.calls


@functools.cache
def observed(entry: Entry) -> tuple[Call, list[Tensor], list[EagerCall]]:
    """The entry's call, and its outputs and attention calls in eager mode."""
    call = entry.call()
    return call, *eager(call)


def _read(function: Any, args: Any, kwargs: Any) -> EagerCall | None:
    if function is F.scaled_dot_product_attention:
        return _sdpa(*args, **kwargs)
    if function is F.multi_head_attention_forward:
        return _mha(*args, **kwargs)
    if function in (F.softmax, torch.softmax, Tensor.softmax):
        return _softmax(*args, **kwargs)
    return None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> EagerCall:
    masked = attn_mask is not None or kwargs.get("is_causal", False) or (len(args) > 1 and args[1])
    return EagerCall("sdpa", query.shape[-2], key.shape[-2], query.shape[1], query.shape[-1], masked)


def _mha(query: Tensor, key: Tensor, value: Tensor, embed: int, heads: int, *args: Any, **kwargs: Any) -> EagerCall:
    masked = kwargs.get("attn_mask") is not None or kwargs.get("key_padding_mask") is not None
    return EagerCall("mha", query.shape[0], key.shape[0], heads, embed // heads, masked)


def _softmax(input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> EagerCall | None:
    """A map of scores has a batch or heads, queries and keys; two dimensions are a router's or a classifier's."""
    if input.dim() < 3 or dim not in (-1, input.dim() - 1):
        return None
    return EagerCall("softmax", input.shape[-2], input.shape[-1])


def _uniform_softmax(function: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return function(input.masked_fill(input > -1e4, 0.0), *args, **kwargs)


def _uniform(function: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    return function(torch.zeros_like(query), *args, **kwargs)


def _unmasked_sdpa(function: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return function(query, key, value, scale=kwargs.get("scale"), enable_gqa=kwargs.get("enable_gqa", False))


def _unmasked_mha(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **{**kwargs, "attn_mask": None, "key_padding_mask": None, "is_causal": False})


# Attention that weighs all keys it may attend to alike, and attention that forgets its mask.
UNIFORM = {"sdpa": _uniform, "mha": _uniform, "softmax": _uniform_softmax}
UNMASKED = {"sdpa": _unmasked_sdpa, "mha": _unmasked_mha}
