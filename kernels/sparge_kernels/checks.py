"""What `sparge::attention` accepts, as pure checks: static facts for a compiler, whole calls for the operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparge_kernels.mask_inputs import EMPTY_ROWS
from sparge_kernels.thresholds import FIELDS, PREDICTORS, check_count

MAX_HEAD_DIM = 256  # 127 * 127 * 256 < 2^24: INT8 products stay exact in fp32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("int8", "none")
DEVICES = ("cpu", "cuda")  # "cuda" is torch's name for AMD's GPUs too


def supported_device(device: torch.device) -> str | None:
    """None if a kernel exists for the device, else the reason in words."""
    if device.type in DEVICES:
        return None
    return f"there is no kernel for device '{device.type}'; supported: {', '.join(DEVICES)}"


def check_static(head_dim: int, value_head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """None if calls of this kind are supported, else the reason in words."""
    for name, dim in (("head_dim", head_dim), ("value head_dim", value_head_dim)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            return f"{name} {dim} is not supported; allowed: 1 to {MAX_HEAD_DIM}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not supported; allowed: {_names(DTYPES)}"
    return supported_device(device)


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    enable_gqa: bool,
    precision: str,
    predictor: str,
    layout: Sequence[int],
) -> None:
    """ValueError or TypeError on a call no kernel takes. Symbolic sizes are left to the run-time check."""
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; sparge::attention takes [batch, heads, tokens, head_dim]. "
                "Unsqueeze or reshape it to 4 dimensions."
            )
    _check_dtype_and_device(named)
    _check_sizes(query, key, value)
    _check_heads(query.shape[1], key.shape[1], enable_gqa)
    if precision not in PRECISIONS:
        hint = " (fp8 has no kernel yet)" if precision == "fp8" else ""
        raise ValueError(f"precision={precision!r} is not supported{hint}; allowed: {_names(PRECISIONS)}.")
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor={predictor!r} is not known; allowed: {_names(PREDICTORS)}.")
    if layout and sorted(layout) != [0, 1, 2, 3]:
        raise ValueError(f"layout={list(layout)} is neither a permutation of [0, 1, 2, 3], outermost first, nor empty.")


def check_thresholds(thresholds: Sequence[float], table: Tensor | None, query: Tensor) -> None:
    """ValueError or TypeError unless there is one entry for all heads, or one per query head, in one of the two."""
    if table is None:
        if isinstance(query.shape[1], int):
            check_count(thresholds, query.shape[1])
        return
    if len(thresholds) > 0:
        raise ValueError("thresholds and threshold_table are given together; leave thresholds empty.")
    if table.dtype != torch.float64:
        raise TypeError(f"threshold_table is {table.dtype}; torch.float64 is allowed.")
    if table.device != query.device:
        raise ValueError(f"threshold_table is on {table.device}, query on {query.device}. Move it.")
    shape, heads = list(table.shape), query.shape[1]
    entries = shape[0] if shape else 0
    counted = isinstance(entries, int) and isinstance(heads, int)
    if len(shape) != 2 or shape[1] != FIELDS or (counted and entries not in (1, heads)):
        raise ValueError(
            f"threshold_table has shape {shape}; [1, {FIELDS}] (one entry for all heads) or [{heads}, {FIELDS}] (one "
            "for each query head) is allowed."
        )


def check_mask(
    attn_mask: Tensor | None, query: Tensor, key: Tensor, *, is_causal: bool, hides: bool, empty_rows: str
) -> None:
    """ValueError or TypeError on a mask no kernel takes."""
    if empty_rows not in EMPTY_ROWS:
        raise ValueError(f"empty_rows={empty_rows!r} is not known; allowed: {_names(EMPTY_ROWS)}.")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("attn_mask and is_causal=True are given together; put causality into the mask.")
    if attn_mask.dtype not in (torch.bool, query.dtype):
        raise TypeError(f"attn_mask is {attn_mask.dtype}; bool and query's {query.dtype} are allowed. Cast it.")
    if hides and attn_mask.dtype != torch.bool:
        raise TypeError(f"mask_hides=True is given with an attn_mask of {attn_mask.dtype}; it is about bool masks.")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask is on {attn_mask.device}, query on {query.device}. Move it.")
    wanted = (*query.shape[:3], key.shape[2])
    fits = attn_mask.dim() == 4 and all(
        size == 1 or size == other or not isinstance(size, int) or not isinstance(other, int)
        for size, other in zip(attn_mask.shape, wanted, strict=True)
    )
    if not fits:
        shape = list(attn_mask.shape)
        raise ValueError(f"attn_mask has shape {shape}; {list(wanted)} is allowed, or 1 in place of any size.")


def _check_dtype_and_device(named: dict[str, Tensor]) -> None:
    dtypes = {name: tensor.dtype for name, tensor in named.items()}
    if len(set(dtypes.values())) != 1 or dtypes["query"] not in DTYPES:
        raise TypeError(
            f"dtypes are {_pairs(dtypes)}; query, key and value must share one of {_names(DTYPES)}. Cast them."
        )
    devices = {name: tensor.device for name, tensor in named.items()}
    if len(set(devices.values())) != 1:
        raise ValueError(f"devices are {_pairs(devices)}; query, key and value must be on one device. Move them.")


def _check_sizes(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    for what, sizes in (
        ("batch size (dim 0)", (query.shape[0], key.shape[0], value.shape[0])),
        ("number of kv heads (dim 1)", (key.shape[1], value.shape[1])),
        ("number of keys (dim 2)", (key.shape[2], value.shape[2])),
        ("head_dim of query and key (dim 3)", (query.shape[3], key.shape[3])),
    ):
        if len({size for size in sizes if isinstance(size, int)}) > 1:
            raise ValueError(f"{what} differs: {shapes}. It must be equal; batches are not broadcast.")
    for name, dim in (("head_dim", query.shape[3]), ("value head_dim", value.shape[3])):
        if isinstance(dim, int) and not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name} is {dim}; 1 to {MAX_HEAD_DIM} is allowed. Use F.scaled_dot_product_attention.")


def _check_heads(q_heads: int, kv_heads: int, enable_gqa: bool) -> None:
    if not (isinstance(q_heads, int) and isinstance(kv_heads, int)) or q_heads == kv_heads:
        return
    if not enable_gqa:
        raise ValueError(
            f"{q_heads} query heads over {kv_heads} kv heads; equal numbers are allowed. "
            "Pass enable_gqa=True to share each kv head between consecutive query heads."
        )
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads over {kv_heads} kv heads; enable_gqa allows multiples only.")


def _names(options: Sequence[object]) -> str:
    return ", ".join(str(option).removeprefix("torch.") for option in options)


def _pairs(named: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {what}" for name, what in named.items())
