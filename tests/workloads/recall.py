"""Q, K and V of the trained recall model (examples/recall), taken where it calls attention."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

_EXAMPLE = Path(__file__).parents[2] / "examples" / "recall"
QUESTIONS = 64


def recall_layer(layer: int, tokens: int, spread: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v fp32 [1, 2, tokens, 64] of layer 0 or 1 on one sequence with 64 questions, `spread` tokens each."""
    data, model = modules()
    generator = torch.Generator().manual_seed(seed)
    batch = data.make_batch(1, tokens, pairs=QUESTIONS, queries=QUESTIONS, generator=generator, spread=spread)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    dense = F.scaled_dot_product_attention

    def see(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.append((q, k, v))
        return dense(q, k, v, **options)  # type: ignore[arg-type]

    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", see):
        model.load_pretrained()(batch.tokens, batch.query_positions)
    return tuple(x.contiguous() for x in seen[layer])  # type: ignore[return-value]


def modules() -> tuple[ModuleType, ...]:
    """The example's `data` and `model`: examples are no package, and other examples may have modules of these names."""
    names = ("data", "model")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(_EXAMPLE))
    try:
        return tuple(importlib.import_module(name) for name in names)
    finally:
        sys.path.remove(str(_EXAMPLE))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
