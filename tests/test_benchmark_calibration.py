"""The calibration benchmark measures both workloads, and a calibrated model answers as the dense one does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

import sparge_compile as sparge
from sparge_compile.backend import transform
from sparge_compile.rules import BREAK_EVEN
from sparge_kernels.cpu import KERNEL_VARIABLE


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "blocked")
    for kind in BREAK_EVEN:
        monkeypatch.setitem(BREAK_EVEN, kind, 1024)  # short inputs on every CPU
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    torch._dynamo.reset()
    yield importlib.import_module("calibration")
    torch._dynamo.reset()


def test_a_row_has_the_ratio_and_what_was_chosen(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["calibration.py", "--only", "smooth field, 3 layers", "--scale", "0.125"])
    benchmark.main()
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("| smooth field"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["1024", "2"] and float(cells[5]) > 0 and 0 < float(cells[6]) <= 1
    assert float(cells[7]) <= 0.05 and float(cells[8]) >= 0.95 and "attention.2" in shown


def test_a_calibrated_recall_model_answers_inputs_it_was_not_calibrated_on(benchmark):
    model, batches = benchmark.recall(2048, 3)
    calibrated, unseen = batches[:2], batches[2]
    policy = sparge.Policy(min_tokens=0)
    profile = sparge.calibrate(model, calibrated, policy=policy, progress=False)
    assert len(profile.sites) == 2 and not profile.dense
    assert all(m.density < 1 for entries in profile.measured.values() for m in entries)
    policy = sparge.Policy(min_tokens=0, profile=profile, strict=True)
    with torch.no_grad():
        expected = model(*unseen).argmax(-1)
        compiled = torch.compile(model, backend=lambda gm, _: transform(gm, policy) and gm.forward)
        assert torch.equal(compiled(*unseen).argmax(-1), expected)
