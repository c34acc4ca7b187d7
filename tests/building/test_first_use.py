"""The first use builds and checks the kernel, in whatever state the caller's torch is."""

import subprocess
import sys

import pytest

STATES = {
    "plain": "context = contextlib.nullcontext()",
    "autocast": "context = torch.autocast('cpu', dtype=torch.bfloat16)",
    "meta-device": "context = torch.device('meta')",
    "default-dtype": "torch.set_default_dtype(torch.float64); context = contextlib.nullcontext()",
    "fake-tensors": "context = FakeTensorMode()",
    "inference": "context = torch.inference_mode()",
    "grad": "context = torch.enable_grad()",
}
PROGRAM = """
import contextlib, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from sparge_kernels import ops
{state}
with context:
    print(ops.unavailable(torch.device("cpu")))
"""


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_the_check_does_not_see_the_callers_state(tmp_path, monkeypatch, state):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))
    command = [sys.executable, "-c", PROGRAM.format(state=state)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "None\n"), run.stderr


EXPORT = """
import torch, sparge_compile as sparge
class Model(torch.nn.Module):
    def forward(self, q):
        return sparge.attention(q, q, q)
q = torch.randn(1, 2, 200, 16)
program = torch.export.export(Model(), (q,))
assert "sparge.attention" in str(program.graph)
torch.testing.assert_close(program.module()(q), Model()(q))
print("None")
"""


def test_the_first_use_may_be_an_export(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))
    run = subprocess.run([sys.executable, "-c", EXPORT], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "None\n"), run.stderr
