"""Across processes and beside other models: caches never serve a stale graph, and nobody else is touched."""

import json
import os
import subprocess
import sys

import pytest
import torch
from arms import item
from light import CLOSE, EXACT_OPTIONS, Stack
from torch import nn

import sparge_compile as sparge
from sparge_kernels.cpu import KERNEL_VARIABLE

# Imports nothing but torch until the model has run: the backend is found by its name alone.
PROGRAM = """
import json, sys, torch
torch.manual_seed(0)
class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) * 2
x = torch.randn(1, 2, 200, 8).cumsum(2) / 14
options = {"sparge.min_tokens": 0, "sparge.similarity_threshold": -1.0, "sparge.topk": float(sys.argv[1])}
assert "sparge_compile" not in sys.modules
with torch.no_grad():
    out = torch.compile(Attention(), backend="sparge", options=options)(x, x, x)
from torch._dynamo.utils import counters
hits = sum(counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_lookup_hit"))
hits += counters["aot_autograd"]["autograd_cache_hit"]
import sparge_compile
report = sparge_compile.last_report().to_json()
print(json.dumps({"out": out.double().sum(-1).flatten().tolist(), "report": report, "hits": hits,
                  "native": "sparge_kernels.cpu.native" in sys.modules}))
"""


def in_a_fresh_process(program: str, *arguments: str, cache: str | None = None, kernel: str = "native") -> str:
    environment = {**os.environ, KERNEL_VARIABLE: kernel, **({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {})}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same program twice with one cache, then with another policy, then with another kernel."""
    cache = str(tmp_path_factory.mktemp("inductor"))
    variants = [("0.5", "native"), ("0.5", "native"), ("1.0", "native"), ("0.5", "blocked")]
    return [json.loads(in_a_fresh_process(PROGRAM, topk, cache=cache, kernel=kernel)) for topk, kernel in variants]


def test_the_backend_is_found_by_name_with_only_torch_imported(runs):
    (site,) = json.loads(runs[0]["report"])["sites"]
    assert (site["name"], site["rewritten"], site["thresholds"][0]["topk"]) == ("Attention", True, 0.5)


@item(13, "compiled")
def test_a_warm_cache_gives_the_same_numbers_and_the_same_report(runs):
    assert runs[1]["hits"] > runs[0]["hits"] == 0, "the second process did not use the cache: nothing was tested"
    assert runs[1]["out"] == runs[0]["out"] and runs[1]["report"] == runs[0]["report"]


@item(13, "compiled")
def test_a_changed_policy_is_not_served_stale(runs):
    (site,) = json.loads(runs[2]["report"])["sites"]
    assert site["thresholds"][0]["topk"] == 1.0
    assert runs[2]["out"] != runs[0]["out"]


@item(13, "compiled")
def test_a_changed_kernel_runs_in_the_graph_of_the_cache(runs):
    assert runs[3]["hits"] > 0 and runs[0]["native"] and not runs[3]["native"]
    assert runs[3]["out"] == pytest.approx(runs[0]["out"], rel=2e-2, abs=2e-2)


def test_importing_the_package_brings_neither_triton_nor_inductor():
    # torch's own compiler imports Triton where it is installed, so it is imported before the count.
    program = "import sys, torch, torch._dynamo.symbolic_convert; before = set(sys.modules); import sparge_compile\n"
    program += "new = {n.split('.')[0] for n in set(sys.modules) - before}\n"
    program += "print(sorted(n for n in ('triton', 'transformers', 'diffusers', 'kernels') if n in new), "
    program += "'torch._inductor.compile_fx' in set(sys.modules) - before)"
    assert in_a_fresh_process(program) == "[] False"


def test_importing_the_kernels_brings_neither_triton_nor_the_compiler():
    program = "import sys, torch; before = set(sys.modules); import sparge_kernels.ops\n"
    program += "new = {n.split('.')[0] for n in set(sys.modules) - before}\n"
    program += "print(sorted(new & {'triton', 'sparge_compile'}))"
    assert in_a_fresh_process(program) == "[]"


@item(14, "compiled")
def test_models_compiled_otherwise_or_not_at_all_are_the_same_before_during_and_after():
    torch.manual_seed(1)
    eager, plain, rewritten = (Stack(1).eval() for _ in range(3))
    vae = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.SiLU()).eval()
    x = torch.randn(1, 6, 16)
    compiled = torch.compile(plain, backend="inductor")
    ours = torch.compile(rewritten, backend="sparge", options=EXACT_OPTIONS)
    function, sdpa = nn.Module.__call__, torch.nn.functional.scaled_dot_product_attention

    def others():
        with torch.no_grad():
            return eager(x), compiled(x), vae(x)

    before = others()
    with torch.no_grad(), sparge.rewriting(topk=0.5):
        first = ours(x)
        during = others()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), rewritten(x), **CLOSE)
    after = others()
    for one in (during, after):
        assert all(torch.equal(a, b) for a, b in zip(one, before, strict=True))
    assert first.shape == x.shape and sparge.last_report().rewritten
    assert nn.Module.__call__ is function and torch.nn.functional.scaled_dot_product_attention is sdpa
