"""`sdpa_kernel` around a compiled call: the user asked for that kernel, and gets no other in there."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from light import CLOSE, EXACT, EXACT_FIELDS, EXACT_OPTIONS, Attention, LightBackend, qkv
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparge_compile as sparge
from sparge_compile import Policy, StrictPolicyError, context
from sparge_kernels import ops

X = torch.randn(1, 6, 16)
ALL = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]
REGIONS = {
    "one": [SDPBackend.MATH],
    "another": [SDPBackend.FLASH_ATTENTION],
    "all-but-one": [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "all-ordered": [SDPBackend.MATH, *(kernel for kernel in ALL if kernel is not SDPBackend.MATH)],
    "ordered": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
}


@pytest.fixture
def backend():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield LightBackend()


@pytest.mark.parametrize("first", ["region", "none"])
@pytest.mark.parametrize("name", REGIONS)
def test_a_region_around_the_call_is_honoured_whichever_was_compiled_first(name, first, backend):
    kernels = REGIONS[name]
    model = Attention().eval()
    compiled = torch.compile(model, backend=backend)

    def inside():
        with sdpa_kernel(kernels, set_priority="ordered" in name), ops.record_stats() as records:
            assert torch.equal(compiled(X), model(X))
        assert records == []

    def outside():
        with ops.record_stats() as records:
            torch.testing.assert_close(compiled(X), model(X), **CLOSE)
        assert [record.ran for record in records] == ["sparse"]

    for call in ([inside, outside] if first == "region" else [outside, inside]) * 2:
        call()
    assert backend.compiles == 2
    (refused,) = [site for site in backend.sites if not site.rewritten]
    names = [kernel.name.lower().split("_attention")[0].replace("efficient", "mem_efficient") for kernel in kernels]
    assert all(name in refused.reason for name in ("sdpa_kernel", *names))


def test_each_choice_of_kernels_has_its_own_graph(backend):
    """Inductor decomposes a dense call by the kernel allowed when it compiles: one graph for two choices is wrong."""
    compiled = torch.compile(Attention().eval(), backend=backend)
    for kernels in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kernels):
            compiled(X)
    assert backend.compiles == 2


def test_a_kernel_switched_off_for_the_process_is_said_out_loud_and_comes_back(backend):
    compiled = torch.compile(Attention().eval(), backend=backend)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with pytest.warns(UserWarning, match=r"none of 1 attention calls[^$]*only these kernels: flash, mem_efficient"):
            compiled(X)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    compiled(X)
    assert backend.rewritten == [False, True]


def test_no_kernel_allowed_is_not_taken_for_all():
    with sdpa_kernel([SDPBackend.OVERRIDEABLE]):
        assert "only these kernels: none;" in context.STATE.reserved
    assert context.STATE.reserved == ""


def test_torch_starts_with_every_kernel_allowed():
    program = "import torch\nfrom sparge_compile import context\nprint(repr(context.STATE.reserved))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "''", done.stderr[-2000:]


def test_a_region_entered_in_eager_code_between_graphs_reaches_the_frames_inside(backend):
    def inner(x):
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(x, x, x)

    def outer(x):
        with sdpa_kernel(SDPBackend.MATH):
            x = inner(x)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(x, x, x)

    (q, _, _) = qkv()
    compiled = torch.compile(outer, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(compiled(q), outer(q), **CLOSE)
    assert backend.rewritten == [False, True]


def switching(x):
    torch.backends.cuda.enable_flash_sdp(False)
    out = F.scaled_dot_product_attention(x, x, x)
    torch.backends.cuda.enable_flash_sdp(True)
    return out


def test_a_model_that_switches_kernels_itself_is_left_alone(backend):
    (q, _, _) = qkv()
    assert torch.equal(torch.compile(switching, backend=backend)(q), switching(q))
    assert "enable_..._sdp" in backend.reason


def test_strict_and_explain_know_the_region():
    model = Attention().eval()
    with sdpa_kernel(SDPBackend.MATH):
        (site,) = sparge.explain(model, X, policy=EXACT).sites
        with pytest.raises(StrictPolicyError, match="only these kernels: math"):
            sparge.explain(model, X, policy=Policy(**EXACT_FIELDS, strict=True))
    assert "only these kernels: math" in site.reason
    assert sparge.explain(model, X, policy=EXACT).rewritten


def test_without_rewriting_there_is_no_second_guard(backend):
    compiled = torch.compile(Attention().eval(), backend=backend)
    with sparge.rewriting(enabled=False):
        compiled(X)
        with sdpa_kernel(SDPBackend.MATH):
            compiled(X)
    assert backend.compiles == 1


def test_regions_do_not_recompile_functions_without_attention(backend):
    compiled = torch.compile(lambda x: x.relu() + 1, backend=backend)
    compiled(X)
    with sdpa_kernel(SDPBackend.MATH):
        compiled(X)
    assert backend.compiles == 1


def test_the_function_is_an_explicit_call_that_a_region_does_not_reach():
    q, k, v = qkv()
    with sdpa_kernel(SDPBackend.MATH), ops.record_stats() as records:
        out = sparge.attention(q, k, v, **EXACT_FIELDS)
        compiled = torch.compile(lambda: sparge.attention(q, k, v, **EXACT_FIELDS), backend="eager")()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), **CLOSE)
    assert torch.equal(out, compiled) and [record.ran for record in records] == ["sparse", "sparse"]


def names_of_kernels(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("fields", [{"min_tokens": 99}, {"enabled": False}], ids=["too-short", "disabled"])
def test_what_the_function_does_densely_runs_on_the_kernel_of_the_region(fields):
    q, k, v = qkv()
    for kernels, expected in ((SDPBackend.MATH, "math"), (SDPBackend.FLASH_ATTENTION, "flash")):
        with sdpa_kernel(kernels):
            names = names_of_kernels(lambda: sparge.attention(q, k, v, **fields))
        ran = [name for name in names if "scaled_dot_product" in name and name.rsplit("::")[-1].startswith("_")]
        assert len(ran) == 1 and expected in ran[0], names


def test_the_operators_own_dense_path_runs_on_the_kernel_of_the_region():
    q, k, v = qkv()
    with sdpa_kernel(SDPBackend.MATH):
        names = names_of_kernels(
            lambda: torch.ops.sparge.attention(q, k, v, thresholds=[0.0, 1.0, 1.0, -1e30], min_tokens=99)
        )
    assert "aten::_scaled_dot_product_attention_math" in names


def test_threads_see_the_setting_torch_shares_between_them(backend):
    """The setting is the process's: a call of another thread during a region would run on its kernel, so it does."""
    compiled, out = torch.compile(Attention().eval(), backend=backend), []

    def other():
        with torch.no_grad():
            out.append(compiled(X))

    compiled(X)
    with sdpa_kernel(SDPBackend.MATH):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert backend.rewritten == [True, False] and len(out) == 1


def test_the_kernel_of_a_region_is_the_one_that_runs_through_inductor():
    model = Attention().eval()
    compiled = torch.compile(model, backend="sparge", options=EXACT_OPTIONS)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        compiled(X)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            compiled(X)
            inside = names_of_kernels(lambda: compiled(X))
        outside = names_of_kernels(lambda: compiled(X))
    assert any("_scaled_dot_product_flash_attention_for_cpu" in name for name in inside)
    assert "sparge::attention" in outside and "sparge::attention" not in inside
