"""`sparge.attention` in an exported program: the operator survives, also in an AOTInductor package, in any process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from light import CLOSE
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import sparge_compile as sparge
from sparge_kernels import ops

LENGTHS = (300, 150, 40)  # the one to export with, and others that the program must serve


class Exported(nn.Module):
    """Self-attention over x [B, S, 16] with two heads, by the function; x in a trunk that has work of its own."""

    def __init__(self, **arguments):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.arguments = arguments

    def forward(self, x, mask=None):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        out = sparge.attention(q, k, v, mask, topk=0.3, similarity_threshold=-1.0, **self.arguments)
        out, stats = out if isinstance(out, tuple) else (out, ())
        return self.out(out.transpose(1, 2).flatten(2)), *stats


def inputs(length, masked=False):
    x = torch.randn(2, length, 16).cumsum(1) / length**0.5
    return (x, torch.rand(length, length) > 0.3) if masked else (x,)


CALLS = {
    "plain": {},
    "causal": {"is_causal": True, "scale": 0.2},
    "stats": {"return_stats": True},
    "short": {"min_tokens": 64},
    "mask": {},
}


def operators(program):
    return [str(node.target) for node in program.graph.nodes if "attention" in str(node.target)]


def agrees(function, model, arguments):
    """Does `function` do what the model does, to the bit, by the same number of sparse calls?"""
    with ops.record_stats() as theirs:
        expected = model(*arguments)
    with ops.record_stats() as records:
        actual = function(*arguments)
    assert len(records) == 1 and records[0].ran == (theirs[0].ran if theirs else "dense")
    for ours, wanted in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
    return records[0]


TOKENS = Dim("tokens", min=2, max=4096)
HOW = {"static": (None, False), "dynamic": (TOKENS, False), "dynamic-strict": (TOKENS, True), "auto": (Dim.AUTO, False)}


@pytest.mark.parametrize(("length", "strict"), HOW.values(), ids=HOW.keys())
@pytest.mark.parametrize("name", CALLS)
def test_the_operator_survives_export_saving_and_loading(name, length, strict, tmp_path):
    torch.manual_seed(0)
    model, masked = Exported(**CALLS[name]).eval(), name == "mask"
    shapes = None if length is None else {"x": {1: length}, **({"mask": {0: length, 1: length}} if masked else {})}
    with torch.no_grad():
        program = torch.export.export(model, inputs(LENGTHS[0], masked), dynamic_shapes=shapes, strict=strict)
        assert len(operators(program)) == 1 and operators(program)[0].startswith("sparge.attention")
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2")
        for one in (program, loaded):
            for served in LENGTHS[: 1 if length is None else 3]:
                record = agrees(one.module(), model, inputs(served, masked))
                assert record.ran == ("dense" if name == "short" and served < 64 else "sparse")
                assert name == "mask" or served < LENGTHS[0] or record.density.max() < 1


def test_where_a_gradient_is_needed_the_exported_program_is_dense():
    with torch.enable_grad():
        program = torch.export.export(Exported(), inputs(LENGTHS[0]))
    assert operators(program) == ["aten.scaled_dot_product_attention.default"]


def test_an_exported_program_can_be_decomposed_and_compiled():
    model, arguments = Exported(is_causal=True).eval(), inputs(LENGTHS[0])
    with torch.no_grad():
        program = torch.export.export(model, arguments).run_decompositions()
        assert operators(program) == ["sparge.attention.default"]
        compiled = torch.compile(program.module(), backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), model(*arguments), **CLOSE)


# Knows nothing of the compiler: torch, the operator and the package are enough.
FRESH = """
import json, sys, torch, sparge_kernels.ops as ops
model = torch._inductor.aoti_load_package(sys.argv[1])
ran, outputs = [], []
for x in torch.load(sys.argv[2]):
    with torch.no_grad(), ops.record_stats() as records:
        out, density, _ = model(x)
    ran += [record.ran for record in records]
    outputs.append(out)
torch.save(outputs, sys.argv[3])
print(json.dumps({"ran": ran, "compiler": "sparge_compile" in sys.modules}))
"""


def test_an_aotinductor_package_runs_the_operator_in_a_fresh_process(tmp_path):
    """Of dynamic length, with a given integer (min_tokens) beside those left at their default (layout)."""
    torch.manual_seed(0)
    model = Exported(is_causal=True, min_tokens=64, return_stats=True, precision="none").eval()
    served = [inputs(length)[0] for length in LENGTHS]
    with torch.no_grad():
        program = torch.export.export(model, (served[0],), dynamic_shapes={"x": {1: TOKENS}})
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        expected = [model(x)[0] for x in served]
    torch.save(served, tmp_path / "inputs.pt")
    arguments = [package, str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], env=os.environ, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said == {"ran": ["sparse", "sparse", "dense"], "compiler": False}
    for ours, wanted in zip(torch.load(tmp_path / "outputs.pt"), expected, strict=True):
        torch.testing.assert_close(ours, wanted, **CLOSE)
