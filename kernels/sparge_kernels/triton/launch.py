"""How the kernels are launched: one door, and one table of configurations by architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

_numbers: dict[tuple[torch.device, tuple[float, ...]], torch.Tensor] = {}


@dataclass(frozen=True)
class AttendConfig:
    """Of the sparse loop: warps per program, depth of its software pipeline, and whether a GPU was asked."""

    warps: int
    stages: int
    measured: bool = False


# By architecture, then by the bytes of one K tile and one V tile together, the largest first row that holds them.
# Nothing here was measured: warps and stages are what spills no register and fits twice into shared memory.
_ATTEND: dict[str, tuple[tuple[int, AttendConfig], ...]] = {
    "default": ((1 << 30, AttendConfig(8, 2)),),
}


def padded(dim: int) -> int:
    """The power of two that holds head_dim `dim` inside the kernels; INT8 matrix instructions take 32 at a time."""
    return max(32, triton.next_power_of_2(dim))


def architecture(device: torch.device) -> str:
    """"sm90", "gfx942", or "interpreter" for tensors on the CPU."""
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


def attend_config(arch: str, tile_bytes: int) -> AttendConfig:
    """The configuration for K and V tiles of `tile_bytes` together."""
    rows = _ATTEND.get(arch, _ATTEND["default"])
    return next(config for most, config in rows if tile_bytes <= most)


def device_numbers(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The numbers as fp64 on the device, without a copy from the host but at the first call.

    Kept for the life of the process: a captured CUDA graph may hold the address. While one is being captured, nothing
    may be copied from the host or kept, and every number is a fill.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.stack([torch.full((), value, dtype=torch.float64, device=device) for value in values])
    key = (device, values)
    if key not in _numbers:
        with torch.inference_mode(False):
            _numbers[key] = torch.tensor(values, dtype=torch.float64).to(device)
    return _numbers[key]


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launches a Triton kernel on the current stream. Every launch comes through here, so that tests can record it."""
    # Explicit, because Triton 3.10 turns fusion off by default.
    kernel[grid](*args, **meta, enable_fp_fusion=True)
