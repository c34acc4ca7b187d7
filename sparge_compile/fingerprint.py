"""Short texts that differ where the weights of two models, or two batches of inputs, differ."""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparge_compile.markers import PREFIX

_SAMPLES = 8  # elements of each parameter that are looked at, the first and the last among them
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def of_weights(model: Any) -> str:
    """Of the parameters and buffers of a module: names, shapes, dtypes and a few elements of each.

    What is attached (attaching.py) is left out. A function has no weights to be seen: an empty text.
    """
    if not isinstance(model, nn.Module):
        return ""
    digest = hashlib.sha256()
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if not name.rpartition(".")[2].startswith(PREFIX):
                digest.update(f"{name.replace('_orig_mod.', '')} {tensor.dtype} {list(tensor.shape)} ".encode())
                digest.update(_samples(tensor))
    return digest.hexdigest()[:16]


def of_batch(batch: Any) -> str:
    """Of all that a batch holds: tensors and buffers by every byte, other values by what they print."""
    digest = hashlib.sha256()
    _add(digest.update, batch)
    return digest.hexdigest()[:16]


def _samples(tensor: Tensor) -> bytes:
    """The bytes of a few elements. None of a tensor that has no plain memory, such as one on the meta device."""
    count = tensor.numel()
    number = min(count, _SAMPLES)
    positions = [(count - 1) * i // max(number - 1, 1) for i in range(number)]
    try:
        flat = tensor.detach().reshape(-1)
        return bytes(torch.stack([flat[one] for one in positions]).view(torch.uint8).tolist()) if positions else b""
    except (RuntimeError, TypeError):
        return b""


def _add(update: Callable[[Any], None], value: Any) -> None:
    """Feeds a value to a hash; what holds others says how many, so that none runs into the next."""
    if isinstance(value, Tensor):
        _add_tensor(update, value)
    elif isinstance(value, (tuple, list)):
        update(f"list {len(value)} ".encode())
        for one in value:
            _add(update, one)
    elif hasattr(value, "keys") and hasattr(value, "__getitem__"):
        keys = list(value.keys())
        update(f"mapping {len(keys)} ".encode())
        for key in keys:
            _add(update, key)
            _add(update, value[key])
    else:
        _add_other(update, value)


def _add_tensor(update: Callable[[Any], None], tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_meta:
        update(repr(tensor).encode())
        return
    update(f"tensor {tensor.dtype} {list(tensor.shape)} ".encode())
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.numel():
        update((ctypes.c_char * plain.nbytes).from_address(plain.data_ptr()))


def _add_other(update: Callable[[Any], None], value: Any) -> None:
    """An array by its bytes: long ones print shortened. An object's address is no part of what it is."""
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError):
        view = None
    if view is None or "O" in view.format:
        update((_ADDRESS.sub("", repr(value)) + " ").encode())
        return
    update(f"array {view.format} {view.shape} ".encode())
    update(view.tobytes())
