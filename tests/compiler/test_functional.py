"""`sparge.attention` has the contract of F.scaled_dot_product_attention; what it cannot do is dense to the bit."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from light import CLOSE, EXACT, EXACT_FIELDS, qkv
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparge_compile as sparge
from sparge_compile import Policy, StrictPolicyError
from sparge_kernels import ops

SDPA = F.scaled_dot_product_attention


def exact(*args, **kwargs):
    return sparge.attention(*args, **EXACT_FIELDS, **kwargs)


SHAPES = {
    "2d": lambda x: x[0, 0],
    "3d": lambda x: x[0],
    "4d": lambda x: x,
    "5d": lambda x: x[:, None].expand(2, 3, 2, 12, 8),
    "6d": lambda x: x[None, None],
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("reshape", SHAPES.values(), ids=SHAPES.keys())
def test_any_number_of_leading_dimensions(reshape, causal):
    q, k, v = (reshape(x) for x in qkv())
    out, stats = exact(q, k, v, is_causal=causal, return_stats=True)
    torch.testing.assert_close(out, SDPA(q, k, v, is_causal=causal), **CLOSE)
    assert stats.density.shape == stats.pv_skipped.shape == q.shape[:-2] and (stats.density == 1).all()


ARGUMENTS = {
    "scale": {"scale": 0.3},
    "negative-scale": {"scale": -0.3},
    "integer-scale": {"scale": 1},
    "gqa": {"enable_gqa": True},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_arguments_mean_what_they_mean_for_dense(arguments):
    q, k, v = qkv(heads=6, kv_heads=2 if "enable_gqa" in arguments else 6, tokens=9, keys=14)
    torch.testing.assert_close(exact(q, k, v, **arguments), SDPA(q, k, v, **arguments), **CLOSE)


MASKS = {
    "bool-2d": torch.rand(12, 12) > 0.3,
    "bool-5d": torch.rand(2, 3, 1, 12, 1) > 0.3,
    "bool-5d-shared": torch.rand(1, 3, 1, 12, 12) > 0.3,
    "float-1d": torch.randn(12),
    "float-0d": torch.randn(()),
    "float-4d": torch.randn(2, 1, 1, 12),
    "float-3d": torch.randn(2, 12, 12),
    "all-true": torch.ones(12, 12, dtype=torch.bool),
    "row-of-nothing": torch.ones(12, 12, dtype=torch.bool).index_fill(0, torch.tensor([3]), False),
    "expanded": (torch.rand(12) > 0.3).expand(12, 12),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("shape", ["4d", "5d"])
def test_masks_mean_what_they_mean_for_dense(mask, shape):
    if shape == "4d" and mask.dim() not in (2, 3, 4):
        pytest.skip("dense attention refuses it")
    q, k, v = (SHAPES[shape](x) for x in (Q, K, V))
    if shape == "5d" and mask.dim() == 4:
        mask = mask[:, None]
    torch.testing.assert_close(exact(q, k, v, mask, policy=Policy(strict=True)), SDPA(q, k, v, mask), **CLOSE)


def test_a_mask_that_needs_a_gradient_is_dense():
    mask = torch.randn(12, 12, requires_grad=True)
    exact(Q, K, V, mask).square().sum().backward()
    assert mask.grad is not None


def test_positional_arguments_are_in_the_same_order():
    q, k, v = qkv()
    torch.testing.assert_close(exact(q, k, v, None, 0.0, True), SDPA(q, k, v, None, 0.0, True), **CLOSE)


Q, K, V = qkv()
DENSE = {
    "mask-of-another-dtype": ((Q.bfloat16(), K.bfloat16(), V.bfloat16()), {"attn_mask": torch.randn(12, 12)}),
    "float64": ((Q.double(), K.double(), V.double()), {}),
    "wide-head": (tuple(x.repeat(1, 1, 1, 33) for x in (Q, K, V)), {}),
    "batch-broadcast": ((Q, K[:1], V[:1]), {}),
    "fewer-dimensions": ((Q, K[0], V[0]), {}),
    "disabled": ((Q, K, V), {"enabled": False}),
    "fp8": ((Q, K, V), {"precision": "fp8"}),
    "short": ((Q, K, V), {"min_tokens": 13}),
    "scale-tensor": ((Q, K, V), {"scale": torch.tensor(0.3)}),
}


@pytest.mark.parametrize(("inputs", "arguments"), DENSE.values(), ids=DENSE.keys())
def test_what_cannot_be_sparse_is_dense_to_the_bit(inputs, arguments):
    fields = {name: arguments[name] for name in ("enabled", "precision", "min_tokens") if name in arguments}
    plain = {name: value for name, value in arguments.items() if name not in fields}
    out, stats = sparge.attention(*inputs, **plain, **fields, return_stats=True)
    assert torch.equal(out, SDPA(*inputs, **plain))
    assert torch.equal(stats.density, torch.ones(inputs[0].shape[:-2])) and not stats.pv_skipped.any()


@pytest.mark.never_wrong(10, "direct")
def test_dropout_and_gradients_are_dense():
    torch.manual_seed(3)
    dropped = sparge.attention(Q, K, V, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(dropped, SDPA(Q, K, V, dropout_p=0.5))
    grads = []
    for function in (sparge.attention, SDPA):
        q = Q.clone().requires_grad_()
        function(q, K, V).square().sum().backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


def test_an_input_that_requires_grad_is_sparse_without_grad_mode():
    q = Q.clone().requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(exact(q, K, V, policy=Policy(strict=True)), SDPA(q, K, V), **CLOSE)


STRICT = {name: case for name, case in DENSE.items() if name not in ("disabled", "short", "scale-tensor")}


@pytest.mark.never_wrong(15, "direct")
@pytest.mark.parametrize(("inputs", "arguments"), STRICT.values(), ids=STRICT.keys())
def test_strict_raises_with_the_reason(inputs, arguments):
    with pytest.raises(StrictPolicyError, match=r"cannot be done sparsely: \w+"):
        sparge.attention(*inputs, **arguments, strict=True)


def test_errors_of_dense_are_errors_here():
    q, k, v = qkv(heads=6, kv_heads=4)
    with pytest.raises(RuntimeError):
        sparge.attention(q, k, v)
    with pytest.raises(TypeError, match="not a policy field"):
        sparge.attention(q, k, v, mask=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_under_autocast_the_dtype_is_that_of_dense(dtype):
    with torch.autocast("cpu", dtype=dtype):
        out, expected = exact(Q, K, V), SDPA(Q, K, V)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.never_wrong(10, "direct")
def test_forward_mode_derivatives_are_never_lost():
    def derivative(function):
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda q: function(q, K, V), (Q,), (torch.ones_like(Q),))[1]

    torch.testing.assert_close(derivative(exact), derivative(SDPA), **CLOSE)
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        out = exact(forward_ad.make_dual(Q, torch.ones_like(Q)), K, V)
        assert forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.never_wrong(10, "direct")
def test_reverse_mode_and_vmap_of_torch_func_are_those_of_dense():
    def gradient(function):
        return torch.func.grad(lambda q: function(q, K, V).square().sum())(Q)

    torch.testing.assert_close(gradient(exact), gradient(SDPA), **CLOSE)
    stacked = [x[None] for x in (Q, K, V)]
    torch.testing.assert_close(torch.vmap(exact)(*stacked), torch.vmap(SDPA)(*stacked), **CLOSE)


def test_nested_tensors_are_dense():
    parts = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    out = sparge.attention(parts, parts, parts)
    assert torch.equal(out.values(), SDPA(parts, parts, parts).values())


@pytest.mark.never_wrong(16, "direct")
def test_rewriting_does_not_reach_it_and_its_own_fields_do():
    q, k, v = qkv(batch=1, tokens=300)
    with sparge.rewriting(enabled=False):
        _, stats = sparge.attention(q, k, v, topk=0.2, similarity_threshold=-1.0, return_stats=True)
    assert stats.density.max() < 1
    _, from_policy = sparge.attention(q, k, v, policy=Policy(topk=0.2, similarity_threshold=-1.0), return_stats=True)
    assert torch.equal(from_policy.density, stats.density)


@pytest.mark.parametrize("return_stats", [False, True], ids=["output", "stats"])
def test_it_compiles_in_one_graph(return_stats):
    def function(q, k, v):
        return sparge.attention(q, k, v, is_causal=True, policy=EXACT, return_stats=return_stats)

    with torch.no_grad():
        out = torch.compile(function, backend="aot_eager", fullgraph=True)(Q, K, V)
    torch.testing.assert_close(out[0] if return_stats else out, SDPA(Q, K, V, is_causal=True), **CLOSE)


def test_it_compiles_through_inductor_with_dynamic_lengths():
    def function(q, k, v):
        return sparge.attention(q, k, v, policy=EXACT).transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (12, 9):
            q, k, v = qkv(tokens=tokens, keys=17)
            torch.testing.assert_close(compiled(q, k, v), SDPA(q, k, v).transpose(1, 2).flatten(2) + 1, **CLOSE)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_fields_compile_in_one_graph(dynamic):
    with torch.no_grad():
        out = torch.compile(exact, backend="eager", fullgraph=True, dynamic=dynamic)(Q, K, V)
    torch.testing.assert_close(out, SDPA(Q, K, V), **CLOSE)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_masks_compile_in_one_graph(dynamic):
    with torch.no_grad():
        out = torch.compile(exact, fullgraph=True, dynamic=dynamic)(Q, K, V, MASKS["float-4d"])
    torch.testing.assert_close(out, SDPA(Q, K, V, MASKS["float-4d"]), **CLOSE)


def test_without_a_kernel_it_is_dense_to_the_bit_or_raises(monkeypatch):
    monkeypatch.setattr(ops, "unavailable", lambda device, has_mask=False: "the native CPU kernel is not available: x")
    assert torch.equal(exact(Q, K, V), SDPA(Q, K, V))
    with pytest.raises(StrictPolicyError, match="native CPU kernel is not available"):
        exact(Q, K, V, strict=True)


def test_tensors_without_memory_are_dense_as_torch_has_them():
    q = torch.empty(1, 2, 5, 8, device="meta")
    assert sparge.attention(q, q, q).shape == F.scaled_dot_product_attention(q, q, q).shape
