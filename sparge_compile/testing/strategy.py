"""`attention_inputs`: a hypothesis strategy of attention calls. hypothesis is imported when it is called."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch

from sparge_compile.testing.inputs import LAYOUTS, MASKS, NON_FINITE, VALUES, AttentionInputs, check_name

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

_EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)
_HEAD_DIMS = (1, 3, 16, 40, 64, 72, 96, 128, 256)
_SCALES = (None, 0.0, -0.5, 0.3, 1.5)  # as shares of 1 / sqrt(head_dim)
_CAUSAL_SCALES = tuple(share for share in _SCALES if share is None or share > 0)


def attention_inputs(
    *,
    dtypes: Collection[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    devices: Collection[str] = ("cpu",),
    max_tokens: int = 257,
    max_head_dim: int = 256,
    max_heads: int = 7,
    max_batch: int = 2,
    masks: Iterable[str | None] | None = None,
    causal: bool | None = None,
    layouts: Iterable[str] | None = None,
    values: Iterable[str] | None = None,
    scales: bool = True,
    self_attention: bool = False,
    non_finite: bool = False,
) -> SearchStrategy[AttentionInputs]:
    """Attention calls as models make them, and as kernels get them wrong.

    Draws lengths of 1 to max_tokens, of queries and keys apart, often at the edges of tiles; grouped-query heads; head
    dims of 1 to max_head_dim, another for values; every memory layout, mask and kind of numbers in `LAYOUTS`, `MASKS`
    and `VALUES`; causal calls; scales. Tensors are made from a drawn seed, so drawing is fast, and failures shrink
    towards few tokens, one head, fp32, no mask, contiguous.

    Args:
        dtypes, devices: of query, key and value.
        max_tokens, max_head_dim, max_heads, max_batch: the largest sizes.
        masks: names of `MASKS`, and None for calls without one. None: all of them.
        causal: True or False for calls that all are or are not `is_causal`. None: both.
        layouts, values: names of `LAYOUTS` and `VALUES`. None: all of them.
        scales: draw scales too: others than 1 / sqrt(head_dim), and for calls that are not `is_causal` also negative
            ones and zero (the CPU's fused `F.scaled_dot_product_attention` is_causal gives NaN there).
        self_attention: as many queries as keys.
        non_finite: also draw inf and NaN (`NON_FINITE`).

    Raises:
        ImportError: hypothesis is not installed.
        ValueError: a name that is not known, nothing to draw from, or a size below 1.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise ImportError(
            "attention_inputs() needs hypothesis, which is not installed: pip install 'sparge-compile[testing]'"
        ) from error
    for name, size in (
        ("max_tokens", max_tokens),
        ("max_head_dim", max_head_dim),
        ("max_heads", max_heads),
        ("max_batch", max_batch),
    ):
        if size < 1:
            raise ValueError(f"{name}={size}: must be 1 or more.")
    known_values = {**VALUES, **(NON_FINITE if non_finite else {})}
    mask_choice = _chosen("masks", masks, (None, *MASKS))
    layout = st.sampled_from(_chosen("layouts", layouts, LAYOUTS))
    value_choice = _chosen("values", values, known_values)
    lengths = _sizes(st, _EDGES, max_tokens)
    head_dims = _sizes(st, _HEAD_DIMS, max_head_dim)
    heads = [(q, kv) for q in range(1, max_heads + 1) for kv in range(1, q + 1) if q % kv == 0]
    dtype_choice, device_choice = _chosen("dtypes", dtypes), _chosen("devices", devices)

    @st.composite
    def draw_inputs(draw: DrawFn) -> AttentionInputs:
        is_causal = draw(st.booleans()) if causal is None else causal
        k_len = draw(lengths)
        head_dim = draw(head_dims)
        q_heads, kv_heads = draw(st.sampled_from(heads))
        share = draw(st.sampled_from(_CAUSAL_SCALES if is_causal else _SCALES)) if scales else None
        return AttentionInputs(
            q_len=k_len if self_attention else draw(lengths),
            k_len=k_len,
            batch=draw(st.integers(1, max_batch)),
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_head_dim=draw(st.just(head_dim) | head_dims),
            dtype=draw(st.sampled_from(dtype_choice)),
            device=draw(st.sampled_from(device_choice)),
            layouts=(draw(layout), draw(layout), draw(layout)),
            mask=None if is_causal else draw(st.sampled_from(mask_choice)),
            is_causal=is_causal,
            scale=None if share is None else share * head_dim**-0.5,
            values=draw(st.sampled_from(value_choice)),
            seed=draw(st.integers(0, 1000)),
        )

    return draw_inputs()


def _chosen(field: str, names: Iterable[Any] | None, known: Collection[Any] | None = None) -> list[Any]:
    """What to draw from, the simplest first: in the order of `known`."""
    if names is None:
        return list(known or ())
    chosen = list(names)
    if not chosen:
        raise ValueError(f"{field} is empty: nothing to draw from.")
    if known is None:
        return chosen
    for name in chosen:
        check_name(field, name, dict.fromkeys(known))
    return [name for name in known if name in chosen]


def _sizes(st: Any, edges: tuple[int, ...], largest: int) -> SearchStrategy[int]:
    strategy: SearchStrategy[int] = st.sampled_from([size for size in edges if size <= largest]) | st.integers(
        1, largest
    )
    return strategy
