"""The operator `sparge::attention`: schema, fake, validation and dispatch by device. Imports no Triton.

`sparge::attention` returns the output; `sparge::attention_with_stats` returns (output, density, pv_skipped).
Arguments:

    query [B, Hq, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, Dv]: one dtype (fp32, bf16 or fp16), one
        device, any strides. Hq == Hkv, or Hq a multiple of Hkv with enable_gqa (repeat_interleave semantics).
    thresholds: 4 numbers for all heads or for each query head, see thresholds.pack; empty with a threshold_table.
    threshold_table: the same numbers as a tensor, fp64 [1 or Hq, 4] on query's device, in place of `thresholds`: they
        may differ from call to call of one compiled graph. On a GPU nothing reads them back, so numbers out of range
        are an error on the CPU only; whoever fills the table makes them from `Thresholds`.
    attn_mask: bool (True is "attend") or query's dtype, [B or 1, Hq or 1, Sq or 1, Sk or 1]; not with is_causal.
    mask_hides: True of a bool attn_mask is "hidden".
    empty_rows: what a query gives to which attn_mask leaves nothing: "zero" (as SDPA does), "nan", or the "mean" of the
        values of all keys.
    is_causal: top-left aligned. scale: default 1 / sqrt(D).
    precision: "int8" or "none" (no quantization).
    predictor: "clusters" or "sparge" (the paper's), see predict.py.
    min_tokens: a call with fewer queries or keys runs dense (density 1, pv_skipped 0); default 0.
    layout: the output's memory order, outermost dimension first, so that its strides follow from the
        arguments alone. Empty is [0, 2, 1, 3]: the order B, S, H, D.
    site: the attention site's name, for `record_stats`.

The operator is opaque: define plus one implementation per device. It has no backward (an error), and forward-mode
differentiation passes it by, as every operator of torch.library: `sparge_compile.attention` is dense there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_kernels.checks import DEVICES, check_call, check_mask, check_static, check_thresholds, supported_device
from sparge_kernels.mask_inputs import attending, fill_empty_rows
from sparge_kernels.records import CallTimer, Recorder, StatsRecord, record_stats, recording
from sparge_kernels.thresholds import DEFAULT_PREDICTOR, Thresholds, unpack

__all__ = [
    "CallTimer",
    "StatsRecord",
    "check_static",
    "int8_products",
    "record_stats",
    "supported_device",
    "unavailable",
    "unmeasured",
]

# No default holds an integer: AOTInductor's generated code passes the integers of an argument left at its default, its
# runtime does not expect them, and the call fails.
_ARGUMENTS = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, Tensor? threshold_table=None, *, "
    "float[] thresholds=[], bool is_causal=False, float? scale=None, bool enable_gqa=False, str precision='int8', "
    "str predictor='clusters', int? min_tokens=None, int[] layout=[], str site='', bool mask_hides=False, "
    "str empty_rows='zero')"
)
# The kernels take any strides, so Inductor need not copy inputs to the strides seen while tracing.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

torch.library.define("sparge::attention", f"{_ARGUMENTS} -> Tensor", tags=_TAGS)
torch.library.define(
    "sparge::attention_with_stats",
    f"{_ARGUMENTS} -> (Tensor output, Tensor density, Tensor pv_skipped)",
    tags=_TAGS,
)


def unavailable(device: torch.device, has_mask: bool = False, k_len: int = 0) -> str | None:
    """None if the device's kernel can run here and now, else the reason. May build it: some seconds, once."""
    reason = supported_device(device)
    if reason is not None:
        return reason
    if device.type == "cpu":
        from sparge_kernels import cpu

        return cpu.unavailable(has_mask)
    try:
        from sparge_kernels import triton
    except ImportError as error:
        return (
            f"the GPU kernels need Triton, which cannot be imported here ({error}); install the one of your torch build"
        )
    return triton.unavailable(device, k_len)


def int8_products(device: torch.device) -> str | None:
    """The instructions of a CPU that multiply INT8 codes faster than fp32 numbers, if it was measured with some."""
    from sparge_kernels import cpu

    return cpu.int8_products() if device.type == "cpu" else None


def unmeasured(device: torch.device, dtype: torch.dtype, precision: str) -> str | None:
    """None if a break-even length is known or assumed for this machine and such a call, else why none is."""
    if device.type == "cpu":
        from sparge_kernels import cpu

        return cpu.unmeasured(dtype)
    if precision == "none" or dtype == torch.float32:
        name = str(dtype).removeprefix("torch.")
        return f"on a GPU {name} calls with precision='{precision}' were not measured, and are expected to be slow"
    return None


@dataclass(frozen=True)
class _Done:
    """What a call computed. statistics: density and pv_skipped, if they were wanted."""

    output: Tensor
    statistics: tuple[Tensor, Tensor] | None
    ran: Literal["sparse", "dense"]
    tiles: Tensor | None


def _compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    threshold_table: Tensor | None = None,
    *,
    thresholds: Sequence[float] = (),
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    precision: str = "int8",
    predictor: str = DEFAULT_PREDICTOR,
    min_tokens: int | None = None,
    layout: Sequence[int] = (),
    site: str = "",
    mask_hides: bool = False,
    empty_rows: str = "zero",
    with_statistics: bool,
    recorder: Recorder | None,
) -> _Done:
    check_call(query, key, value, enable_gqa=enable_gqa, precision=precision, predictor=predictor, layout=layout)
    check_thresholds(thresholds, threshold_table, query)
    check_mask(attn_mask, query, key, is_causal=is_causal, hides=mask_hides, empty_rows=empty_rows)
    if attn_mask is not None:
        attn_mask = attending(attn_mask, mask_hides)
    out = _empty_output(query, value, layout)
    per_head = _per_head(query, thresholds, threshold_table)
    runs_dense = min(query.shape[2], key.shape[2]) < (min_tokens or 0) or out.numel() == 0 or key.numel() == 0
    if not runs_dense and (reason := unavailable(query.device, attn_mask is not None, key.shape[2])):
        # Who compiles here never gets here: a program exported elsewhere does, or one whose environment has changed.
        warnings.warn(f"sparge::attention runs dense: {reason}", stacklevel=3)
        runs_dense = True
    kept = None if recorder is None or runs_dense else recorder.room_for_tiles(site, query, key)
    with torch.autocast(query.device.type, enabled=False):
        if runs_dense:
            _dense(query, key, value, attn_mask, is_causal, scale, enable_gqa, out)
            statistics = _dense_statistics(query) if with_statistics else None
        else:
            statistics = _kernels(query.device)(
                query,
                key,
                value,
                thresholds=per_head,
                attn_mask=attn_mask,
                is_causal=is_causal,
                scale=query.shape[-1] ** -0.5 if scale is None else scale,
                precision=precision,
                predictor=predictor,
                out=out,
                with_statistics=with_statistics,
                kept=kept,
            )
        if attn_mask is not None:
            fill_empty_rows(out, value, attn_mask, empty_rows)
    return _Done(out, statistics, "dense" if runs_dense else "sparse", kept)


def _run(*args: Any, with_statistics: bool = True, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    recorder = recording()
    done = _compute(*args, **kwargs, with_statistics=with_statistics or recorder is not None, recorder=recorder)
    if recorder is not None and done.statistics is not None:
        lengths = (args[0].shape[2], args[1].shape[2])
        recorder.add(StatsRecord(kwargs.get("site", ""), lengths, *done.statistics, done.ran, done.tiles), args, kwargs)
    return done.output, *(done.statistics or (None, None))


def _per_head(query: Tensor, thresholds: Sequence[float], table: Tensor | None) -> list[Thresholds] | Tensor:
    """One entry per query head; the table itself where reading it would wait for the device."""
    if table is None:
        return unpack(tuple(thresholds), query.shape[1])
    if query.device.type == "cpu":
        from sparge_kernels import cpu

        if cpu.chosen_kernel() != "interpreted":
            return unpack(tuple(table.flatten().tolist()), query.shape[1])
    return table


def _dense_statistics(query: Tensor) -> tuple[Tensor, Tensor]:
    density = torch.ones(query.shape[:2], dtype=torch.float32, device=query.device)
    return density, torch.zeros_like(density)


def _kernels(device: torch.device) -> Callable[..., tuple[Tensor, Tensor] | None]:
    """What runs sparse calls on the device; `unavailable` has no reason against it."""
    if device.type == "cpu":
        from sparge_kernels import cpu

        return cpu.attention
    from sparge_kernels import triton

    return triton.attention


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    out: Tensor,
) -> None:
    """`F.scaled_dot_product_attention` into `out`; no keys give zeros."""
    if out.numel() == 0 or k.numel() == 0:
        out.zero_()  # what SDPA gives, but torch 2.11's CPU kernel dies of a division by zero heads
        return
    if scale is not None and scale <= 0:
        # CPU SDPA gives NaN for a causal call with scale <= 0: let q carry the sign.
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    out.copy_(F.scaled_dot_product_attention(q, k, v, attn_mask, **options))


def _empty_output(query: Tensor, value: Tensor, layout: Sequence[int]) -> Tensor:
    shape = (*query.shape[:3], value.shape[3])
    return torch.empty_permuted(shape, tuple(layout) or (0, 2, 1, 3), dtype=query.dtype, device=query.device)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    return _run(*args, **kwargs, with_statistics=False)[0]


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    threshold_table: Tensor | None = None,
    *,
    thresholds: Sequence[float] = (),
    is_causal: bool = False,
    enable_gqa: bool = False,
    precision: str = "int8",
    predictor: str = DEFAULT_PREDICTOR,
    layout: Sequence[int] = (),
    mask_hides: bool = False,
    empty_rows: str = "zero",
    **_: Any,
) -> Tensor:
    check_call(query, key, value, enable_gqa=enable_gqa, precision=precision, predictor=predictor, layout=layout)
    check_thresholds(thresholds, threshold_table, query)
    check_mask(attn_mask, query, key, is_causal=is_causal, hides=mask_hides, empty_rows=empty_rows)
    return _empty_output(query, value, layout)


def _fake_with_stats(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    density = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    return _fake(query, *args, **kwargs), density, torch.empty_like(density)


def _unsupported(query: Tensor, *_: Any, **__: Any) -> Any:
    raise NotImplementedError(f"sparge::attention: {supported_device(query.device)}")


def _refuse_grad(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    # Called only when grad mode is on and an input requires grad.
    raise RuntimeError(
        "sparge::attention has no backward, and grad mode is on with an input that requires grad. Run under "
        "torch.no_grad(), or use F.scaled_dot_product_attention where a gradient is needed."
    )


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("sparge::attention has no backward.")


for _name, _implementation, _fake_implementation in (
    ("sparge::attention", _attention, _fake),
    ("sparge::attention_with_stats", _run, _fake_with_stats),
):
    torch.library.impl(_name, "default", _unsupported)
    torch.library.impl(_name, DEVICES, _implementation)
    torch.library.register_fake(_name, _fake_implementation)
    torch.library.register_autograd(_name, _no_backward, setup_context=_refuse_grad)
