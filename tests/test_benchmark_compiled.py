"""The benchmarks of compiled models run, and check what they time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compile_overhead
import masks

from sparge_compile import dynamo


@pytest.fixture(autouse=True)
def no_gradients():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def test_a_line_of_the_overhead_table_counts_every_layer_and_puts_inductor_back():
    before = dynamo.compile_with_inductor
    name, rewritten, of, found, ours, inductor, share, everything = compile_overhead.measure("encoder", 1).split()
    assert (name, rewritten, of, found) == ("encoder", "1", "of", "1")
    assert 0 < float(ours) < float(everything) and 0 < float(inductor) < float(everything)
    assert float(share) == pytest.approx(100 * float(ours) / float(inductor), rel=0.1)
    assert dynamo.compile_with_inductor is before


def test_a_line_of_the_masks_table_is_of_a_call_that_is_right():
    line = masks.compare("documents", 256, torch.float32, repeats=1)
    kind, tokens, visible, _, error, dense, sparse, ratio = line.split()
    assert (kind, tokens, float(visible)) == ("documents", "256", 0.127)
    assert float(error) < 0.01 and min(float(dense), float(sparse), float(ratio)) > 0


def test_what_is_further_off_than_allowed_is_not_timed(monkeypatch):
    monkeypatch.setattr(masks, "MAX_RELATIVE_L1", 1e-9)
    with pytest.raises(SystemExit, match="not timed"):
        masks.compare("padding", 256, torch.float32, repeats=1)
