"""How the kernels are launched: one door, and one table of configurations by architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class AttendConfig:
    """Of the sparse loop. rows: of a query tile per program. chunk: dimensions of Q and K at a time in exact products.
    warps: per program. stages: depth of the software pipeline.
    """

    warps: int
    stages: int
    rows: int = 128
    chunk: int = 64


# By architecture and kind of Q, K and V: head dimensions up to 128 (if not powers of two, V is loaded under a mask), or
# up to 256; 16-bit numbers or fp32. Nothing here was measured: it is what spills no register, fits into shared memory
# and keeps the loads pipelined, see benchmarks/results/triton_resources.md.
_SMALL, _ODD, _PLAIN = "128", "odd 128", "128, not quantized"
_LARGE, _SMALL_FP32, _LARGE_FP32 = "256", "fp32 128", "fp32 256"
_DEFAULT = {
    _SMALL: AttendConfig(8, 2),
    _ODD: AttendConfig(8, 2),
    _PLAIN: AttendConfig(8, 2),
    _LARGE: AttendConfig(8, 1, rows=64, chunk=32),
    _SMALL_FP32: AttendConfig(8, 1, rows=64, chunk=16),
    _LARGE_FP32: AttendConfig(8, 1, rows=64, chunk=16),
}
_FEW_ROWS = AttendConfig(8, 1, rows=32, chunk=16)
_HALF = AttendConfig(8, 2, rows=64)
_ATTEND: dict[str, dict[str, AttendConfig]] = {
    "sm80": {_SMALL: AttendConfig(8, 3), _PLAIN: _HALF, _SMALL_FP32: _FEW_ROWS, _LARGE_FP32: _FEW_ROWS},
    "sm86": {_PLAIN: _HALF, _SMALL_FP32: _FEW_ROWS, _LARGE_FP32: _FEW_ROWS},
    "sm89": {_PLAIN: _HALF, _SMALL_FP32: _FEW_ROWS, _LARGE_FP32: _FEW_ROWS},
    "sm90": {_SMALL: AttendConfig(8, 3), _LARGE_FP32: _FEW_ROWS},
    "sm100": {_SMALL: AttendConfig(8, 3), _LARGE_FP32: _FEW_ROWS},
    "sm120": {_ODD: _HALF, _SMALL_FP32: _FEW_ROWS, _LARGE_FP32: _FEW_ROWS},
    "interpreter": dict.fromkeys(_DEFAULT, AttendConfig(8, 1)),  # as the reference: a query tile is one program's
}


@dataclass(frozen=True)
class WeightsConfig:
    """Of the kernel that weighs K tiles. block: tiles at a time, four columns of a product each; the rest as above."""

    warps: int
    stages: int
    block: int


# Relatives of an architecture with its instructions and no more shared memory than it.
_RELATIVES = {"sm87": "sm86", "sm103": "sm100", "sm110": "sm100", "sm121": "sm120"}


def padded(dim: int) -> int:
    """The power of two that holds head_dim `dim` inside the kernels; INT8 matrix instructions take 32 at a time."""
    return max(32, triton.next_power_of_2(dim))


def architecture(device: torch.device) -> str:
    """ "sm90", "gfx942", or "interpreter" for tensors on the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def product(arch: str) -> str:
    """How products of floating-point tiles are computed there, see attend.multiply."""
    if arch == "interpreter":
        return "widened"
    return "ieee" if arch.startswith("gfx") else "tf32x3"


def attend_config(arch: str, dim: int, v_dim: int, element_size: int, quantized: bool) -> AttendConfig:
    """The configuration for these head dimensions of Q and K, and of V, and numbers of `element_size` bytes."""
    large, odd = max(padded(dim), padded(v_dim)) > 128, padded(v_dim) != v_dim
    if element_size > 2:
        kind = _LARGE_FP32 if large else _SMALL_FP32
    elif large:
        kind = _LARGE
    else:
        kind = _PLAIN if not quantized else _ODD if odd else _SMALL
    return _ATTEND.get(_RELATIVES.get(arch, arch), _DEFAULT).get(kind, _DEFAULT[kind])


def weights_config(arch: str, dim: int) -> WeightsConfig:
    """The configuration for this head dimension of Q and K."""
    if arch == "interpreter":
        return WeightsConfig(warps=8, stages=1, block=64)
    warps = 4 if arch.startswith("gfx") else 8  # of 64 threads there
    return WeightsConfig(warps, stages=2 if padded(dim) <= 128 else 1, block=16)


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launches a Triton kernel on the current stream. Every launch comes through here, so that tests can record it."""
    # Explicit, because Triton 3.10 turns fusion off by default.
    kernel[grid](*args, **meta, enable_fp_fusion=True)
