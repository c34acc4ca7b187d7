"""Without a GPU the GPU kernels are tested in Triton's interpreter, which is chosen when Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-interpreted",
        action="store_true",
        help="without a GPU: run every case of the GPU kernels in Triton's interpreter, not a few of each test",
    )
    parser.addoption(
        "--fuzz-examples",
        type=int,
        default=300,
        help="how many random programs tests/fuzz compiles; the default is always the same ones",
    )
