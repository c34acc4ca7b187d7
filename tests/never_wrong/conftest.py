"""One thread, nothing compiled, no kernel chosen; and how many cases of a test run on the arms that are slow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from arms import Arm

from sparge_kernels.cpu import KERNEL_VARIABLE

# What an entry or a kernel does not see of a case needs no run of all of them. Without a GPU:
CASES = {
    "reference": 60,
    "reference-shared": 60,
    "triton-direct": 1,
    "triton-compiled": 1,
    "blocked-compiled": 6,
    "native-compiled": 10,
    "gpu": 1,
}
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each test runs on each arm on at most CASES of its cases, spread evenly."""
    limits = dict(CASES)
    if torch.cuda.is_available():
        del limits["gpu"]
    if config.getoption("--all-interpreted"):
        limits = {name: limit for name, limit in limits.items() if not name.startswith("triton")}
    cases: dict[tuple[str, Arm], list[pytest.Item]] = {}
    for item in items:
        arm = item.callspec.params.get("arm") if HERE in item.path.parents and hasattr(item, "callspec") else None
        if isinstance(arm, Arm):
            cases.setdefault((item.nodeid.split("[")[0], arm), []).append(item)
    dropped = set()
    for (_, arm), of_one_test in cases.items():
        limit = limits.get(str(arm), limits.get(arm.kernel, len(of_one_test)))
        step = max(len(of_one_test) / limit, 1)
        kept = {of_one_test[int(n * step)] for n in range(limit) if n * step < len(of_one_test)}
        dropped.update(set(of_one_test) - kept)
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)
    assert KERNEL_VARIABLE not in os.environ
