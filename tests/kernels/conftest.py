"""Small tensors run faster on one thread, and results are then the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import run_triton

from sparge_kernels.cpu import KERNEL_VARIABLE

INTERPRETED_CASES = 4  # of each test


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton's interpreter takes tenths of a second a call: without a GPU, each test runs it on cases spread evenly."""
    if torch.cuda.is_available() or config.getoption("--all-interpreted"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        runs_kernel = getattr(item, "callspec", None) is not None and item.callspec.params.get("kernel") is run_triton
        if runs_kernel or item.get_closest_marker("interpreted"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    dropped = set()
    for of_one_test in cases.values():
        step = max(len(of_one_test) / INTERPRETED_CASES, 1)
        kept = {of_one_test[int(n * step)] for n in range(INTERPRETED_CASES) if n * step < len(of_one_test)}
        dropped.update(set(of_one_test) - kept)
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


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
