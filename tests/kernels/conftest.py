"""Small tensors run faster on one thread, and results are then the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparge_kernels.cpu import KERNEL_VARIABLE


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def default_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests name the kernel they run."""
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
