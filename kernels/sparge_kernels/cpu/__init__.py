"""CPU implementations of `sparge::attention`: the native kernel, and one in plain torch for those who ask for it."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sparge_kernels.thresholds import Thresholds

KERNEL_VARIABLE = "SPARGE_CPU_KERNEL"
"""Environment variable: "native" (default); "blocked", which needs no compiler, is slow and takes no masks; or
"interpreted", the GPU kernels in Triton's interpreter (TRITON_INTERPRET=1), for tests: right, and slower than anything.
"""

KERNELS = ("native", "blocked", "interpreted")


def chosen_kernel() -> str:
    """The kernel that `SPARGE_CPU_KERNEL` names; ValueError if there is none of that name."""
    name = os.environ.get(KERNEL_VARIABLE) or KERNELS[0]
    if name not in KERNELS:
        raise ValueError(f"{KERNEL_VARIABLE}={name!r} is no CPU kernel; allowed: {', '.join(KERNELS)}.")
    return name


def unavailable(has_mask: bool) -> str | None:
    """None if the chosen kernel can run such a call here, else the reason. Builds the native kernel if need be."""
    if chosen_kernel() == "blocked":
        return f"the CPU kernel of {KERNEL_VARIABLE}=blocked takes no attn_mask" if has_mask else None
    if chosen_kernel() == "interpreted":
        from sparge_kernels import triton

        return triton.unavailable(torch.device("cpu"))
    from sparge_kernels.cpu import build, native

    try:
        native.library()
    except build.Unavailable as error:
        return f"the native CPU kernel is not available: {error}"
    return None


def int8_products() -> str | None:
    """The instructions by which the native kernel multiplies INT8 codes faster than fp32 numbers here.

    None: none of those measured, or another kernel was chosen.
    """
    from sparge_kernels.cpu import build

    return products_of(build.cpu_features().split()) if chosen_kernel() == "native" else None


def products_of(features: Collection[str]) -> str | None:
    """`int8_products` of a CPU with these features."""
    if "avx512_vnni" in features:
        return "AVX-512 VNNI"
    # In 16 bits. With AVX-512 but no VNNI that is done too, beside a faster dense attention: not measured.
    return "AVX2" if "avx2" in features and "avx512f" not in features else None


def unmeasured(dtype: torch.dtype) -> str | None:
    """None if the default break-even length was measured for CPUs like this one, else why it says nothing here."""
    from sparge_kernels.cpu import build

    if dtype == torch.float32 or "amx_tile" not in build.cpu_features().split():
        return None
    name = str(dtype).removeprefix("torch.")
    return f"on a CPU with AMX dense {name} attention is many times faster, and the kernel was not measured against it"


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
    predictor: str,
    out: Tensor,
    with_statistics: bool = True,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Runs the chosen kernel, which `unavailable` has no reason against; `native.attention` has the contract."""
    options: dict[str, Any] = {
        "thresholds": thresholds,
        "is_causal": is_causal,
        "scale": scale,
        "precision": precision,
        "predictor": predictor,
        "out": out,
        "kept": kept,
    }
    if chosen_kernel() == "blocked":
        from sparge_kernels.cpu import blocked

        return blocked.attention(q, k, v, **options)
    if chosen_kernel() == "interpreted":
        from sparge_kernels import triton

        return triton.attention(q, k, v, attn_mask=attn_mask, **options, with_statistics=with_statistics)
    from sparge_kernels.cpu import native

    return native.attention(q, k, v, attn_mask=attn_mask, **options)
