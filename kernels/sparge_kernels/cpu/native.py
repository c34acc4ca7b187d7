"""The native CPU kernel: attention.cpp behind the seam that blocked.py has too.

Departures from the numbers of reference.py, beyond fp32 rounding:

- Quantized calls, and those in bf16, multiply weights and values in bf16 where the CPU can: a relative L1 of some
  thousandths (the tests allow .01), and values below 1e-33 are lost.
- Scores of clusters are products of bf16 where the CPU can: a tile whose weight is within some hundredths of a nat of
  the limit may be kept or not.
- An infinite value whose weight is below e^-82 gives NaN, not infinity: the weight is 0 in fp32.
- Which tiles of a row of NaN stage 2 skips, and so counts, differs; the row is NaN either way.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from sparge_kernels import reference
from sparge_kernels.cpu import build
from sparge_kernels.thresholds import DEFAULT_PREDICTOR, NEVER_SKIP, PREDICTORS, Thresholds

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
_PREDICTORS = {"sparge": 0, "clusters": 1}
_MAX_ERROR = {"int8": 2e-2, "none": 1e-4}  # relative L1 of a sound build; seen: 2e-3 and 4e-7


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4))


class _Thresholds(ctypes.Structure):
    _fields_ = (("topk", ctypes.c_double), *((name, ctypes.c_float) for name in ("cdf", "similarity", "skip_below")))


class Call(ctypes.Structure):
    """`Call` of inputs.h, field by field."""

    _fields_ = (
        *((name, _Tensor) for name in ("q", "k", "v", "out", "mask")),
        ("thresholds", ctypes.POINTER(_Thresholds)),
        *((name, ctypes.c_void_p) for name in ("density", "pv_skipped", "kept")),
        *((name, ctypes.c_int64) for name in ("batch", "q_heads", "kv_heads", "q_len", "k_len", "dim", "value_dim")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "mask_dtype", "is_causal", "int8", "predictor", "threads")),
    )


def library() -> ctypes.CDLL:
    """The kernel for this CPU, built at first use. Raises `build.Unavailable`."""
    return build.load(accept=self_check, needs=("sparge_attention",))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    thresholds: Sequence[Thresholds],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    precision: str,
    predictor: str = DEFAULT_PREDICTOR,
    out: Tensor,
    kept: Tensor | None = None,
    using: ctypes.CDLL | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes the attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Sk, D / Dv] to out [B, Hq, Sq, Dv].

    One threshold entry per query head; any strides; no empty tensors. Query head h reads kv head
    h // (Hq // Hkv). attn_mask: bool or float, broadcasts to [B, Hq, Sq, Sk]. Returns density and pv_skipped, fp32
    [B, Hq]; writes stage 1's map to `kept`, bool [B, Hq, nQ, nK], if it is given. `using`: another build of the kernel.
    """
    density, pv_skipped = (torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) for _ in range(2))
    choice: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "precision": precision, "predictor": predictor}
    call = describe(q, k, v, thresholds, attn_mask, **choice, out=out)
    call.density, call.pv_skipped = density.data_ptr(), pv_skipped.data_ptr()
    call.kept = None if kept is None else kept.data_ptr()
    if (using or library()).sparge_attention(ctypes.byref(call)):
        raise MemoryError(f"sparge::attention found no memory for its buffers (query {list(q.shape)}).")
    return density, pv_skipped


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Sequence[Thresholds],
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    precision: str,
    predictor: str = DEFAULT_PREDICTOR,
    out: Tensor,
) -> Call:
    """The call as the library takes it; the tensors must outlive it."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])  # a dimension of size 1 gets stride 0
    entries = [_Thresholds(t.topk or 0.0, t.cdf, t.similarity, t.skip_below(k.shape[2])) for t in thresholds]
    return Call(
        *(_tensor(x) for x in (q, k, v, out)),
        _Tensor() if attn_mask is None else _tensor(attn_mask),
        (_Thresholds * len(entries))(*entries),
        batch=q.shape[0],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        k_len=k.shape[2],
        dim=q.shape[3],
        value_dim=v.shape[3],
        scale=scale,
        dtype=_DTYPES[q.dtype],
        mask_dtype=0 if attn_mask is None else _DTYPES[attn_mask.dtype],
        is_causal=is_causal,
        int8=precision == "int8",
        predictor=_PREDICTORS[predictor],
        threads=1 if _forked else torch.get_num_threads(),
    )


def _tensor(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), tuple(x.stride()))


def _in_child() -> None:
    """A forked child has none of the parent's OpenMP threads, and libgomp waits for them without end."""
    global _forked
    _forked = True


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def self_check(built: ctypes.CDLL) -> str | None:
    """None if a library just built agrees with reference.py on a small call, else the reason in words."""
    # Autocast, a default device and all modes (fake tensors, export, counters) belong to the caller's thread.
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(_check, built).result()
        except Exception as error:  # whatever stops the check: the library is not fit for use
            return f"{type(error).__name__}: {error}"


@torch.no_grad()
def _check(built: ctypes.CDLL) -> str | None:
    generator = torch.Generator("cpu").manual_seed(0)
    wide = [torch.randn(1, 2, 150, 40, generator=generator, dtype=torch.float64, device="cpu") for _ in range(3)]
    q, k, v = (x.float() for x in wide)
    entries = [Thresholds(0.5, 1.0, -1.0, NEVER_SKIP), Thresholds(None, 0.9, -1.0, None)]
    for precision, is_causal, predictor in itertools.product(_MAX_ERROR, (False, True), PREDICTORS):
        out = torch.empty_like(q)
        choice: dict[str, Any] = {"precision": precision, "is_causal": is_causal, "predictor": predictor}
        attention(q, k, v, thresholds=entries, attn_mask=None, scale=0.2, **choice, out=out, using=built)
        expected = reference.attention(*wide, thresholds=entries, scale=0.2, **choice).output
        error = float((out - expected).abs().sum() / expected.abs().sum())
        if not error < _MAX_ERROR[precision]:
            given = ", ".join(f"{name}={value}" for name, value in choice.items())
            return f"relative L1 {error:.3g} against the reference ({given})"
    return None
