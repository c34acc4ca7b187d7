"""What must hold of every compiled kernel, whatever Triton's version, and what may not drift under one version."""

from __future__ import annotations

import torch
import triton
from cross_compile import KILOBYTE, TARGETS, Compiled
from triton_variants import Variant

SPARSE_LOOP = "attend_kernel"
WEIGHTS = "tile_weights_kernel"
REGISTER_DRIFT = 16

# The matrix unit of each target, and how it names its types.
_UNITS = {"sm80": "mma", "sm86": "mma", "sm89": "mma", "sm90": "wgmma", "sm100": "tcgen05", "sm120": "mma"}
_TYPES = {
    "mma": {"int8": "s8", torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"},
    "wgmma": {"int8": "s8", torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"},
    "tcgen05": {"int8": "i8", torch.bfloat16: "f16", torch.float16: "f16", torch.float32: "tf32"},
    "mfma": {"int8": "i8", torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"},
}
_COPIES = ("cp.async", "cp.async.bulk")


def int8_instruction(target: str) -> str:
    """The target's best INT8 matrix instruction that this Triton knows."""
    unit = _UNITS.get(target, "mfma")
    if unit == "tcgen05" and _triton_version() < (3, 9):
        return "mma s8"  # Triton before 3.9 has no INT8 of the fifth generation
    return f"{unit} {_TYPES[unit]['int8']}"


def products(variant: Variant, target: str) -> set[str]:
    """The matrix instructions of the sparse loop: all of them, and no others."""
    unit = _UNITS.get(target, "mfma")
    wide = variant.dtype == torch.float32 and variant.dim > 128
    if wide and unit != "mfma":
        unit = "mma"  # 32 rows a program, so that nothing spills: fewer than the newer instructions take
    needed = {f"{unit} {_TYPES[unit][variant.dtype]}"}  # what cannot be quantized
    if variant.precision == "int8":
        needed |= {f"{unit} {_TYPES[unit]['int8']}" if wide else int8_instruction(target)}
        if variant.dtype == torch.float32:
            needed |= {f"{unit} {_TYPES[unit][torch.bfloat16]}"}  # P V
    return needed


def faults(compiled: Compiled, variant: Variant) -> list[str]:
    """What is wrong with a kernel that `variant` launches; nothing, if all is well."""
    if compiled.error is not None:
        return [f"does not compile: {compiled.error}"]
    found = []
    if compiled.spills:
        found.append(f"spills {compiled.spills} bytes of registers")
    limit = TARGETS[compiled.target].shared_limit
    if compiled.shared > limit:
        found.append(f"needs {compiled.shared / KILOBYTE:.1f} KB of shared memory, the limit is {limit // KILOBYTE}")
    if compiled.kernel == SPARSE_LOOP:
        found += _loop_faults(compiled, variant)
    if compiled.kernel == WEIGHTS:  # its codes are fp16, whatever the inputs
        unit = _UNITS.get(compiled.target, "mfma")
        found += _product_faults(compiled, {f"{unit} {_TYPES[unit][torch.float16]}"})
    return found


def _loop_faults(compiled: Compiled, variant: Variant) -> list[str]:
    found = _product_faults(compiled, products(variant, compiled.target))
    copies = {name for name, _ in compiled.instructions} & set(_COPIES)
    if compiled.stages > 1 and not variant.strided and compiled.target in _UNITS and not copies:
        found.append("loads no tile ahead: there is no asynchronous copy")
    return found


def _product_faults(compiled: Compiled, needed: set[str]) -> list[str]:
    found = []
    has = {name for name, _ in compiled.instructions} - set(_COPIES)
    if has != needed:
        found.append(f"has the matrix instructions {_words(has)}, expected {_words(needed)}")
    if compiled.scalar_products:
        found.append(f"computes {compiled.scalar_products} products of tiles without matrix instructions")
    return found


def _words(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])
