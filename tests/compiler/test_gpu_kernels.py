"""The GPU kernels through torch.compile and sparge.attention: on a GPU, else in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from attached_blocks import X, net, profile
from light import EXACT_OPTIONS, Stack, qkv, run

import sparge_compile as sparge
from sparge_compile import Policy
from sparge_compile.rules import BREAK_EVEN
from sparge_kernels import ops
from sparge_kernels.cpu import KERNEL_VARIABLE
from sparge_kernels.thresholds import pack

triton = pytest.importorskip("sparge_kernels.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := triton.unavailable(torch.device(DEVICE)):
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def gpu_kernels(monkeypatch):
    """Makes the GPU kernels run; lists their calls."""
    monkeypatch.setenv(KERNEL_VARIABLE, "interpreted")
    calls = []

    def spy(*args, _run=triton.attention, **options):
        calls.append(options)
        return _run(*args, **options)

    monkeypatch.setattr(triton, "attention", spy)
    return calls


@pytest.mark.parametrize("mode", [None, "max-autotune"])
def test_a_model_compiled_with_the_backend_runs_them(gpu_kernels, mode):
    model, x = Stack(is_causal=True).to(DEVICE).eval(), torch.randn(2, 150, 16, device=DEVICE)
    options = dict(EXACT_OPTIONS) if mode is None else None
    compiled = torch.compile(model, backend="sparge", options=options, mode=mode)
    with torch.no_grad(), sparge.rewriting(Policy(**{k.removeprefix("sparge."): v for k, v in EXACT_OPTIONS.items()})):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    assert len(gpu_kernels) == 2
    assert [site.rewritten for site in sparge.last_report().sites] == [True, True]


def test_attached_blocks_hand_them_a_table_each(gpu_kernels):
    model, x = net(2).to(DEVICE), X[:, :300].to(DEVICE)
    own = profile(2)
    policy = {"min_tokens": 0, "precision": "none"}
    constants = Policy(**policy, profile=own)
    with sparge.rewriting(constants):
        expected = torch.compile(model, backend="sparge")(x)
    assert all(isinstance(call["thresholds"], list) for call in gpu_kernels)
    with sparge.attach(model, own), sparge.rewriting(**policy):
        for block in model.blocks:
            block.compile(backend="sparge", fullgraph=True)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    tables = [call["thresholds"] for call in gpu_kernels[2:]]
    assert [table.flatten().tolist() for table in tables] == [pack(entries) for entries in own.sites.values()]


@pytest.mark.parametrize("precision", ["int8", "none"])
def test_default_thresholds_and_stats(gpu_kernels, precision):
    q, k, v = (x.to(DEVICE) for x in qkv(tokens=300, dim=64))
    with torch.no_grad():
        out, stats = sparge.attention(q, k, v, is_causal=True, precision=precision, min_tokens=0, return_stats=True)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert len(gpu_kernels) == 1
    assert (out - expected).abs().sum() / expected.abs().sum() < 0.02
    assert stats.density.shape == (2, 2) and stats.density.device == q.device


def test_masks_of_sparge_attention(gpu_kernels):
    q, k, v = (x.to(DEVICE) for x in qkv(tokens=200, dim=16))
    mask = torch.rand(2, 1, 200, 200, device=DEVICE) > 0.5
    with torch.no_grad():
        out = sparge.attention(q, k, v, mask, precision="none", topk=1.0, min_tokens=0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-3, atol=1e-4)
    assert torch.equal(gpu_kernels[0]["attn_mask"], mask)


def test_without_the_interpreter_the_site_is_dense_with_the_reason(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("a GPU needs no interpreter")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    _, backend = run(F.scaled_dot_product_attention, *qkv())
    assert "Triton's interpreter is off; set TRITON_INTERPRET=1" in backend.reason


def test_a_gpu_has_a_default_length():
    assert BREAK_EVEN["cuda"] > 0


def test_more_keys_than_the_selection_holds_are_refused_with_the_number():
    reason = ops.unavailable(torch.device(DEVICE), k_len=triton.MAX_KEYS + 1)
    assert DEVICE == "cpu" or f"{triton.MAX_KEYS + 1} keys" in reason
    assert f"{triton.MAX_KEYS + 1} keys" in triton.unavailable(torch.device(DEVICE), triton.MAX_KEYS + 1)
