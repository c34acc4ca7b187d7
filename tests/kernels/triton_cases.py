"""What the tests of the GPU kernels' stages share; importing it skips a module where Triton cannot run.

They run on a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import on_gpu
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := pytest.importorskip("sparge_kernels.triton").unavailable(torch.device(DEVICE)):
    pytest.skip(reason, allow_module_level=True)


def on_device(x: Tensor) -> Tensor:
    """The tensor with its strides and offset."""
    return on_gpu(x) if DEVICE == "cuda" else x


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN and as the largest integer: what no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
