"""The user's own q, k and v from a file: how many tiles may be skipped depends on the numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparge_compile.bench.problem import DTYPES, Problem
from sparge_kernels.checks import check_static

NAMES = (("q", "query"), ("k", "key"), ("v", "value"))
HOW_TO_SAVE = 'save one call as safetensors.torch.save_file({"q": q, "k": k, "v": v}, "qkv.safetensors")'
NOT_SERVED = "Masks, biases and scales are not measured: leave them out, and say --causal of a causal mask."


class InputsError(ValueError):
    """The file holds no attention call; the message says what it holds and what is wanted."""


def load_problem(
    path: Path, *, is_causal: bool, precision: str, dtype: torch.dtype | None, device: torch.device
) -> Problem:
    """The call in a file of .safetensors, or of .pt (a dict, or q, k and v in this order), cast to `dtype` if given.

    q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv], or without B; fp32, bf16 or fp16. Nothing in a .pt file
    is run (weights_only=True).

    Raises:
        InputsError: it cannot be read, or what it holds is no attention call.
    """
    q, k, v = (x if x.dim() == 4 else x[None] for x in _tensors(path))
    _check_shapes(path, q, k, v)
    chosen = q.dtype if dtype is None else dtype
    if reason := check_static(q.shape[3], v.shape[3], chosen, device):
        raise InputsError(f"{path}: {reason}.")
    q, k, v = (x.to(device=device, dtype=chosen).contiguous() for x in (q, k, v))
    return Problem(q, k, v, is_causal, precision)


def layout_doubt(heads: int, tokens: int) -> str | None:
    """What to say of more heads than tokens; None of others."""
    if heads <= tokens:
        return None
    return f"{heads} heads and {tokens} tokens? The layout must be [batch, heads, tokens, head_dim]: transpose if not."


def _tensors(path: Path) -> list[Tensor]:
    content = _read(path)
    if isinstance(content, (list, tuple)):
        if len(content) > len(NAMES):
            raise InputsError(f"{path} holds {len(content)} things; allowed are q, k and v. {NOT_SERVED}")
        content = dict(zip("qkv", content, strict=False))
    if not isinstance(content, Mapping):
        raise InputsError(f"{path} holds a {type(content).__name__}, not tensors by name; {HOW_TO_SAVE}.")
    found = []
    for names in NAMES:
        tensor = next((content[name] for name in names if name in content), None)
        if not isinstance(tensor, Tensor):
            held = ", ".join(sorted(map(str, content))[:8]) or "nothing"
            raise InputsError(f"{path} has no tensor {names[0]!r} or {names[1]!r}, it has {held}; {HOW_TO_SAVE}.")
        found.append(tensor.detach())
    # What is left out in silence is another call than the user's.
    if len(content) > len(NAMES):
        held = ", ".join(sorted(map(str, content))[:8])
        raise InputsError(f"{path} holds {held}; allowed are q, k and v, each under one name. {NOT_SERVED}")
    return found


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputsError(f"{path} is no file; {HOW_TO_SAVE}.")
    try:
        if path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True)
        if importlib.util.find_spec("safetensors") is None:
            raise InputsError(f"{path} needs safetensors, which is not installed: pip install safetensors")
        from safetensors.torch import load_file

        return load_file(path)
    except InputsError:
        raise
    except Exception as error:  # whatever a broken file makes of a reader
        words = " ".join(str(error).split())[:200]
        raise InputsError(f"{path} cannot be read ({type(error).__name__}: {words}); {HOW_TO_SAVE}.") from error


def _check_shapes(path: Path, q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in zip("qkv", (q, k, v), strict=True))
    fits = (
        all(x.dim() == 4 and x.numel() and x.dtype in DTYPES.values() for x in (q, k, v))
        and q.dtype == k.dtype == v.dtype
        and q.shape[0] == k.shape[0] == v.shape[0]
        and q.shape[1] % k.shape[1] == 0
        and k.shape[1:3] == v.shape[1:3]
        and q.shape[3] == k.shape[3]
    )
    if not fits:
        wanted = "q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] of one dtype, Hq a multiple of Hkv"
        raise InputsError(f"{path} holds {shapes}; wanted are {wanted} ({', '.join(DTYPES)}).")
