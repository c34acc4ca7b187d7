"""Every test starts with nothing compiled, no policy in force and the same random numbers."""

from __future__ import annotations

import pytest
import torch

from sparge_compile import backend


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    backend._policies_of_code.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
