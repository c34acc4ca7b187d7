"""Which CPU kernel runs: the native one; if it cannot be built, none, with that reason; blocked by choice."""

import pytest
import torch
import torch.nn.functional as F
from light import CLOSE, EXACT, qkv, run, stays_dense
from torch._dynamo.exc import BackendCompilerFailed

import sparge_compile as sparge
from sparge_compile import Policy, StrictPolicyError
from sparge_compile.rules import BREAK_EVEN
from sparge_kernels.cpu import KERNEL_VARIABLE, blocked, build, native

INPUTS = qkv()


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    """A machine where nothing was built and nothing can be."""
    monkeypatch.setattr(build, "_results", {})
    monkeypatch.setattr(build, "COMPILERS", ())
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that ran."""
    names = []
    for name, module in (("native", native), ("blocked", blocked)):

        def spy(*args, _name=name, _run=module.attention, **options):
            names.append(_name)
            return _run(*args, **options)

        monkeypatch.setattr(module, "attention", spy)
    return names


def test_without_a_compiler_the_site_is_dense_to_the_bit_with_the_reason(no_compiler):
    stays_dense(attention, *INPUTS, reason="native CPU kernel is not available: there is no C++ compiler")


def test_strict_raises_without_a_compiler(no_compiler):
    with pytest.raises(StrictPolicyError, match=r"no C\+\+ compiler"):
        sparge.attention(*INPUTS, strict=True)
    with pytest.raises(BackendCompilerFailed, match=r"StrictPolicyError[^!]*no C\+\+ compiler"):
        run(attention, *INPUTS, policy=Policy(min_tokens=0, strict=True))


def test_a_call_too_short_to_pay_builds_nothing(no_compiler, monkeypatch):
    monkeypatch.setattr(build, "load", lambda **_: pytest.fail("a build for a call that stays dense anyway"))
    for function in (attention, lambda q, k, v: sparge.attention(q, k, v, is_causal=True, min_tokens=500)):
        out, _ = run(function, *INPUTS, policy=Policy(min_tokens=500))
        assert torch.equal(out, attention(*INPUTS))


def test_the_operator_of_a_program_made_elsewhere_warns_and_runs_dense(no_compiler):
    with pytest.warns(UserWarning, match="sparge::attention runs dense: the native CPU kernel is not avail.*apt-get"):
        out, density, _ = torch.ops.sparge.attention_with_stats(*INPUTS, thresholds=[0.1, 1.0, 0.0, -1.0])
    assert torch.equal(out, F.scaled_dot_product_attention(*INPUTS)) and (density == 1).all()


@pytest.mark.parametrize("choice", [None, "native", "blocked"])
def test_the_environment_variable_chooses(monkeypatch, calls, choice):
    native.library()  # its check of a fresh build runs the kernel too
    calls.clear()
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    if choice:
        monkeypatch.setenv(KERNEL_VARIABLE, choice)
    out, backend = run(attention, *INPUTS)
    assert backend.rewritten == [True] and calls == [choice or "native"]
    torch.testing.assert_close(out, attention(*INPUTS), **CLOSE)


def test_blocked_needs_no_compiler(no_compiler, monkeypatch, calls):
    monkeypatch.setenv(KERNEL_VARIABLE, "blocked")
    out, _ = run(attention, *INPUTS)
    assert calls == ["blocked"]
    torch.testing.assert_close(out, attention(*INPUTS), **CLOSE)


def test_blocked_takes_no_masks_so_they_are_dense(monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "blocked")
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    assert torch.equal(
        sparge.attention(*INPUTS, mask, policy=EXACT), F.scaled_dot_product_attention(*INPUTS, attn_mask=mask)
    )


def test_an_unknown_kernel_is_an_error_that_names_the_known_ones(monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast' is no CPU kernel; allowed: native, blocked"):
        sparge.attention(*INPUTS)


def test_bf16_on_a_cpu_with_amx_is_dense_unless_a_length_is_given(tmp_path, monkeypatch):
    cpu_with(tmp_path, monkeypatch, "avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile")
    inputs = qkv(dtype=torch.bfloat16)
    reasons = [run(attention, *inputs, policy=Policy(min_tokens=n))[1].reason for n in (None, 0)]
    assert "AMX" in reasons[0] and "set min_tokens" in reasons[0] and not reasons[1]
    assert run(attention, *INPUTS, policy=Policy())[1].rewritten == [True]


def test_the_default_length_is_that_of_the_products_instructions(tmp_path, monkeypatch):
    def reason(**fields):
        return run(attention, *INPUTS, policy=Policy(**fields))[1].reason

    cpu_with(tmp_path, monkeypatch, "avx512f avx512_vnni avx512_bf16")
    assert not reason()
    assert "min_tokens is 77:" in reason(precision="none")
    cpu_with(tmp_path, monkeypatch, "avx2 fma")
    assert "min_tokens is 55:" in reason() and "min_tokens is 77:" in reason(precision="none")
    for dtype, minimum in ((torch.float32, 77), (torch.bool, 55)):
        mask = torch.eye(INPUTS[0].shape[2], INPUTS[1].shape[2]).to(dtype)
        assert f"min_tokens is {minimum}:" in run(masked, *INPUTS, mask, policy=Policy())[1].reason
    for features in ("avx2 fma avx512f avx512bw", "sse4_2", "asimd"):  # not measured, or in fp32
        cpu_with(tmp_path, monkeypatch, features)
        assert "min_tokens is 77:" in reason()


def masked(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cpu_with(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(build, "CPU_INFO", tmp_path / "cpuinfo")
    build.CPU_INFO.write_text(f"flags : {flags}\n")
    for kind, tokens in (("AVX-512 VNNI", 0), ("AVX2", 55), ("cpu", 77)):
        monkeypatch.setitem(BREAK_EVEN, kind, tokens)
