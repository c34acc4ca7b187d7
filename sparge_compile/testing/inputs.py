"""`AttentionInputs`: one attention call, described by names and numbers from which its tensors are made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Result = TypeVar("Result")


@dataclass(frozen=True, repr=False)
class AttentionInputs:
    """One call of `F.scaled_dot_product_attention`. Equal descriptions make equal tensors; the repr is a description.

    Attributes:
        q_len, k_len: numbers of queries and keys.
        batch, q_heads, kv_heads: q_heads is a multiple of kv_heads.
        head_dim: of query and key. value_head_dim: of value and output.
        dtype, device: of query, key, value and of a float mask.
        layouts: how query, key and value lie in memory, names of `LAYOUTS`. What lies around a sliced tensor is NaN.
        mask: a name of `MASKS`, or None.
        is_causal, scale: as in the call. Not is_causal with a mask.
        values: what numbers the tensors hold, a name of `VALUES` or `NON_FINITE`.
        seed: of the random numbers.

    Raises:
        ValueError: a name that is not known, heads that do not divide, or is_causal with a mask.
    """

    q_len: int
    k_len: int
    batch: int = 1
    q_heads: int = 1
    kv_heads: int = 1
    head_dim: int = 16
    value_head_dim: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    mask: str | None = None
    is_causal: bool = False
    scale: float | None = None
    values: str = "normal"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads={self.q_heads}: must be a multiple of kv_heads={self.kv_heads}.")
        if self.is_causal and self.mask is not None:
            raise ValueError(f"is_causal=True with mask={self.mask!r}: give one; the mask 'causal' is causal too.")
        for layout in self.layouts:
            check_name("layouts", layout, LAYOUTS)
        check_name("values", self.values, VALUES | NON_FINITE)
        if self.mask is not None:
            check_name("mask", self.mask, MASKS)

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """query [batch, q_heads, q_len, head_dim], key [batch, kv_heads, k_len, head_dim] and value, the same with
        value_head_dim."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = (
            (self.batch, self.q_heads, self.q_len, self.head_dim),
            (self.batch, self.kv_heads, self.k_len, self.head_dim),
            (self.batch, self.kv_heads, self.k_len, self.value_head_dim),
        )
        query, key, value = (torch.randn(size, generator=generator, dtype=torch.float32) for size in sizes)
        (VALUES | NON_FINITE)[self.values](query, key, value, self.dtype)
        placed = (x.to(self.dtype).to(self.device) for x in (query, key, value))
        query, key, value = (LAYOUTS[name](x) for name, x in zip(self.layouts, placed, strict=True))
        return query, key, value

    @property
    def query(self) -> Tensor:
        return self.tensors[0]

    @property
    def key(self) -> Tensor:
        return self.tensors[1]

    @property
    def value(self) -> Tensor:
        return self.tensors[2]

    @functools.cached_property
    def attn_mask(self) -> Tensor | None:
        """Bool (True is "attend") or `dtype`; broadcasts to [batch, q_heads, q_len, k_len]."""
        if self.mask is None:
            return None
        mask = MASKS[self.mask](self, torch.Generator().manual_seed(self.seed + 1))
        mask = mask.to(self.device, mask.dtype if mask.dtype == torch.bool else self.dtype)
        return mask.expand(-1, self.q_heads, self.q_len, -1) if self.mask.endswith("expanded") else mask

    @property
    def enable_gqa(self) -> bool:
        return self.q_heads != self.kv_heads

    @property
    def kwargs(self) -> dict[str, Any]:
        """attn_mask, is_causal, scale and enable_gqa."""
        names = ("attn_mask", "is_causal", "scale", "enable_gqa")
        return {name: getattr(self, name) for name in names}

    def call(self, function: Callable[..., Result]) -> Result:
        """`function(query, key, value, attn_mask=..., is_causal=..., scale=..., enable_gqa=...)`."""
        return function(*self.tensors, **self.kwargs)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """What `F.scaled_dot_product_attention` gives, [batch, q_heads, q_len, value_head_dim] in `dtype`.

        Its plain math; causality as a mask, since the CPU's fused kernel is wrong for is_causal with scale <= 0.
        """
        return self._dense(self.value, dtype)

    def magnitude(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Dense attention over |value|: what an output is made of, also where positive and negative values cancel."""
        return self._dense(self.value.abs(), dtype)

    def _dense(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        mask = self.attn_mask
        if self.is_causal:
            mask = torch.ones(self.q_len, self.k_len, dtype=torch.bool, device=self.device).tril()
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(dtype)
        query, key, value = (x.to(dtype) for x in (self.query, self.key, value))
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=self.enable_gqa
            )

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        return (
            f"AttentionInputs({', '.join(f'{name}={value!r}' for name, value, default in given if value != default)})"
        )

    def __str__(self) -> str:
        """The repr, and shape, dtype and strides of each tensor."""
        named = {"query": self.query, "key": self.key, "value": self.value, "attn_mask": self.attn_mask}
        lines = [
            f"  {name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}, strides {list(x.stride())}"
            for name, x in named.items()
            if x is not None
        ]
        return "\n".join([repr(self), *lines])


def check_name(field: str, name: object, known: dict[str, Any]) -> None:
    """ValueError unless the name is known."""
    if name not in known:
        raise ValueError(f"{field}={name!r}: known are {', '.join(map(str, known))}.")


def _sliced(x: Tensor) -> Tensor:
    return x.new_full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 2), torch.nan)[:, :, 1:-2, 2:].copy_(x)


def _every_other(x: Tensor) -> Tensor:
    return x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), torch.nan)[:, :, ::2].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "tokens-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads-outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last-dim-not-contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": _sliced,
    "every-other-token": _every_other,
    "one-head-expanded": lambda x: x[:, :1].expand_as(x),
    "one-token-expanded": lambda x: x[:, :, :1].expand_as(x),
}
"""Memory layouts: a tensor [batch, heads, tokens, dim] to a view with other strides. Expanded ones have stride 0."""


def _large_values(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
    value *= 1e3 if dtype == torch.float16 else 1e5


def _key_bias(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
    key[..., -1] += 100


def _zero_rows(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
    query[:, :, ::3], key[:, :, 1::2] = 0, 0


def _denormal_keys(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
    key *= 1e-6 if dtype == torch.float16 else 1e-39


def _smooth(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
    for x in (query, key, value):
        steps = torch.arange(1, x.shape[2] + 1, dtype=torch.float32).sqrt()
        x.copy_(x.cumsum(2) / steps[:, None])


def _infinities(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
    query[:, :, query.shape[2] // 2, 0] = torch.inf
    value[:, :, key.shape[2] // 2, -1] = -torch.inf


def _nans(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
    query[:, :, -1, 0] = torch.nan
    key[:, 0, key.shape[2] // 2, -1] = torch.nan
    value[:, :, key.shape[2] // 3, 0] = torch.nan


Values = Callable[[Tensor, Tensor, Tensor, torch.dtype], None]
VALUES: dict[str, Values] = {
    "normal": lambda query, key, value, dtype: None,
    "smooth": _smooth,
    "zero-rows": _zero_rows,
    "key-bias": _key_bias,
    "large-values": _large_values,
    "denormal-keys": _denormal_keys,
}
"""What the tensors hold: normal random numbers, changed in place (smooth: tokens like their neighbours)."""

NON_FINITE: dict[str, Values] = {"infinities": _infinities, "nans": _nans}
"""The same with inf or NaN in some rows."""


def _random(inputs: AttentionInputs, generator: torch.Generator, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=generator, dtype=torch.float32)


def _coins(inputs: AttentionInputs, generator: torch.Generator, *sizes: int) -> Tensor:
    return torch.rand(sizes, generator=generator) > 0.4


def _distances(inputs: AttentionInputs) -> Tensor:
    return torch.arange(inputs.q_len)[:, None] - torch.arange(inputs.k_len)


def _padding(inputs: AttentionInputs, generator: torch.Generator) -> Tensor:
    lengths = torch.randint(1, inputs.k_len + 1, (inputs.batch, 1), generator=generator)
    return (torch.arange(inputs.k_len) < lengths)[:, None, None]


def _some_see_nothing(inputs: AttentionInputs, generator: torch.Generator) -> Tensor:
    mask = _coins(inputs, generator, inputs.batch, 1, inputs.q_len, inputs.k_len)
    mask[:, :, ::3] = False
    return mask


def _hidden(visible: Tensor, number: float) -> Tensor:
    return torch.zeros(visible.shape, dtype=torch.float32).masked_fill(~visible, number)


def _alibi(inputs: AttentionInputs, generator: torch.Generator) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, inputs.q_heads + 1)
    return -_distances(inputs).abs() * slopes[:, None, None]


Mask = Callable[[AttentionInputs, torch.Generator], Tensor]
MASKS: dict[str, Mask] = {
    "bool-2d": lambda i, g: _coins(i, g, i.q_len, i.k_len),
    "bool-3d": lambda i, g: _coins(i, g, i.q_heads, i.q_len, i.k_len),
    "bool-4d": lambda i, g: _coins(i, g, i.batch, i.q_heads, i.q_len, i.k_len),
    "all-true": lambda i, g: torch.ones(i.q_len, i.k_len, dtype=torch.bool),
    "causal": lambda i, g: _distances(i) >= 0,
    "window": lambda i, g: _distances(i).abs() < 30,
    "padding": _padding,
    "padding-expanded": _padding,
    "some-see-nothing": _some_see_nothing,
    "float-2d": lambda i, g: _random(i, g, i.q_len, i.k_len),
    "float-3d": _alibi,
    "float-4d": lambda i, g: _random(i, g, i.batch, 1, i.q_len, i.k_len),
    "float-of-keys-expanded": lambda i, g: _random(i, g, i.batch, 1, 1, i.k_len),
    "float-causal": lambda i, g: _hidden(_distances(i) >= 0, -torch.inf),
    "float-some-see-nothing": lambda i, g: _hidden(_some_see_nothing(i, g), -torch.inf),
    "float-finite-minimum": lambda i, g: _hidden(_padding(i, g), torch.finfo(i.dtype).min),
}
"""Masks by name; those that begin with `float` are added to the scores, the others are bool. Those that end with
`expanded` become views of stride 0."""
