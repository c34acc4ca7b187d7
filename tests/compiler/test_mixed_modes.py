"""Modes and transforms around a compiled call: each does to the rewritten model what it does to the eager one."""

import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from light import CLOSE, EXACT_FIELDS, EXACT_OPTIONS, Attention, LightBackend, qkv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import sparge_compile as sparge
from sparge_compile import Policy
from sparge_kernels import ops

SDPA = F.scaled_dot_product_attention
Q, K, V = qkv()


def attention(q, k, v):
    return SDPA(q, k, v, scale=0.5)


@pytest.fixture(autouse=True)
def no_gradients_and_no_warnings():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class Scaling(TorchFunctionMode):
    """Doubles the scale of every attention call, and counts them."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is SDPA:
            self.calls += 1
            kwargs = {**kwargs, "scale": kwargs["scale"] * 2}
        return function(*args, **kwargs)


class Replacing(TorchFunctionMode):
    """Computes something else in place of attention."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is SDPA:
            return args[2].mean(-2, keepdim=True).expand_as(args[2]) * 3
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["light", "sparge"])
def test_a_mode_that_changes_the_arguments_changes_them_once(backend):
    how = {"light": {"backend": LightBackend()}, "sparge": {"backend": "sparge", "options": EXACT_OPTIONS}}[backend]
    compiled = torch.compile(attention, **how)
    torch.testing.assert_close(compiled(Q, K, V), SDPA(Q, K, V, scale=0.5), **CLOSE)
    for _ in range(2):
        with Scaling() as mode, ops.record_stats() as records:
            out = compiled(Q, K, V)
        torch.testing.assert_close(out, SDPA(Q, K, V, scale=1.0), **CLOSE)
        assert (mode.calls, [record.ran for record in records]) == (1, ["sparse"])
    torch.testing.assert_close(compiled(Q, K, V), SDPA(Q, K, V, scale=0.5), **CLOSE)


def test_the_operators_dense_path_does_not_meet_the_mode_again():
    x = torch.randn(1, 2, 20, 8)
    torch._dynamo.mark_dynamic(x, 2, min=8, max=100)
    compiled = torch.compile(lambda x: attention(x, x, x), backend=LightBackend(Policy(min_tokens=64)))
    with Scaling() as mode, ops.record_stats() as records:
        out = compiled(x)
    torch.testing.assert_close(out, SDPA(x, x, x, scale=1.0), **CLOSE)
    assert [record.ran for record in records] == ["dense"] and mode.calls == 1


def test_a_mode_that_replaces_attention_leaves_nothing_to_rewrite():
    backend = LightBackend()
    compiled = torch.compile(attention, backend=backend)
    with Replacing():
        replaced = compiled(Q, K, V)
        assert torch.equal(replaced, attention(Q, K, V)) and backend.sites == []
    torch.testing.assert_close(compiled(Q, K, V), attention(Q, K, V), **CLOSE)
    assert backend.rewritten == [True]
    with Replacing():
        assert torch.equal(compiled(Q, K, V), replaced)


def positions(q, k, v):
    return attention(q + torch.arange(q.shape[2])[:, None] / 9, k, v) + torch.ones(8)


@pytest.mark.parametrize("call", ["compiled", "function"])
def test_a_default_device_elsewhere_does_not_move_the_kernels_own_tensors(call):
    if call == "compiled":
        function = torch.compile(attention, backend="sparge", options=EXACT_OPTIONS)
    else:

        def function(q, k, v):
            return sparge.attention(q, k, v, scale=0.5, **EXACT_FIELDS)

    with torch.device("meta"), ops.record_stats() as records:
        out = function(Q, K, V)
    torch.testing.assert_close(out, attention(Q, K, V), **CLOSE)
    assert [record.ran for record in records] == ["sparse"] and records[0].density.device == Q.device


def test_factories_in_a_compiled_model_follow_the_default_device():
    compiled = torch.compile(positions, backend=LightBackend())
    with torch.device("cpu"), ops.record_stats() as records:
        torch.testing.assert_close(compiled(Q, K, V), positions(Q, K, V), **CLOSE)
    assert len(records) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_a_default_dtype_does_not_change_the_kernels_own_numbers(dtype):
    fields = {"topk": 0.5, "similarity_threshold": -1.0, "return_stats": True}
    q, k, v = (torch.randn(1, 2, 200, 8) for _ in range(3))
    out, stats = sparge.attention(q, k, v, **fields)
    torch.set_default_dtype(dtype)
    try:
        again, same = sparge.attention(q, k, v, **fields)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, out) and torch.equal(same.density, stats.density) and again.dtype == out.dtype


def test_autocast_entered_after_the_compile_has_its_own_graph_and_its_own_dtype():
    backend = LightBackend()
    model = Attention().eval()
    compiled, x = torch.compile(model, backend=backend), torch.randn(2, 6, 16)
    for _ in range(2):
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                out, expected = compiled(x), model(x)
            assert out.dtype == expected.dtype == (torch.bfloat16 if enabled else torch.float32)
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert backend.rewritten == [True, True]


def test_autocast_bfloat16_through_inductor():
    model, x = Attention().eval(), torch.randn(2, 6, 16)
    compiled = torch.compile(model, backend="sparge", options=EXACT_OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16), ops.record_stats() as records:
        out, expected = compiled(x), model(x)
    assert out.dtype == torch.bfloat16 and [record.ran for record in records] == ["sparse"]
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_inference_tensors_come_out_of_inference_mode_and_go_in_again():
    backend = LightBackend()
    model = Attention().eval()
    compiled, x = torch.compile(model, backend=backend), torch.randn(2, 6, 16)
    with torch.inference_mode():
        inside = compiled(x)
        again = compiled(inside)
        torch.testing.assert_close(again, model(model(x)), **CLOSE)
    assert inside.is_inference()
    outside = compiled(inside)
    torch.testing.assert_close(outside, again, **CLOSE)
    assert not outside.is_inference() and all(backend.rewritten)


def forward_over(function):
    return torch.func.jvp(lambda q: function(q, K, V), (Q,), (torch.ones_like(Q),))[1]


TRANSFORMS = {
    "vmap": lambda f: torch.vmap(f)(Q[None], K[None], V[None]),
    "vmap-some-inputs": lambda f: torch.vmap(f, in_dims=(0, None, None))(torch.stack([Q, -Q, 2 * Q]), K, V),
    "vmap-of-vmap": lambda f: torch.vmap(torch.vmap(f))(*(x[None, None] for x in (Q, K, V))),
    "grad": lambda f: torch.func.grad(lambda q: f(q, K, V).square().sum())(Q),
    "vjp": lambda f: torch.func.vjp(lambda q: f(q, K, V), Q)[1](torch.ones_like(Q))[0],
    "jacrev": lambda f: torch.func.jacrev(lambda q: f(q, K, V))(Q[:1, :1, :2]),
    "jvp": forward_over,
}


@pytest.mark.parametrize("when", ["first", "after-a-plain-call"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_a_compiled_function_are_those_of_the_eager_one(name, when):
    transform, backend = TRANSFORMS[name], LightBackend()
    compiled = torch.compile(attention, backend=backend)
    if when != "first":
        compiled(Q, K, V)
    kernels = [SDPBackend.MATH] if name == "jvp" else list(REGION_OF_ALL)
    with sdpa_kernel(kernels), ops.record_stats() as records:
        torch.testing.assert_close(transform(compiled), transform(attention), **CLOSE)
    assert records == [] and len(backend.sites) <= 1
    torch.testing.assert_close(compiled(Q, K, V), attention(Q, K, V), **CLOSE)
    # TorchDynamo gives up a function that it first meets under a transform, and runs it eagerly from then on.
    assert backend.rewritten == ([] if when == "first" else [True])


REGION_OF_ALL = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)


@pytest.mark.parametrize("inside", ["vmap", "grad", "vjp"])
def test_transforms_inside_a_compiled_function_through_inductor(inside):
    transform = TRANSFORMS[inside]
    compiled = torch.compile(lambda: transform(attention), backend="sparge", options=EXACT_OPTIONS)
    torch.testing.assert_close(compiled(), transform(attention), **CLOSE)
    (site,) = sparge.last_report().sites
    assert not site.rewritten and "torch." in site.reason


def test_forward_mode_around_a_rewritten_graph_is_never_lost_in_silence():
    """TorchDynamo does not guard on it, and the kernel has no derivative: the graph at hand would drop the tangent."""
    backend = LightBackend()
    compiled = torch.compile(attention, backend=backend)
    compiled(Q, K, V)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Q, torch.ones_like(Q))
        with pytest.raises(NotImplementedError, match="forward AD"):  # of the CPU's flash kernel, as in eager
            compiled(dual, K, V)
        with sdpa_kernel(SDPBackend.MATH):
            tangent = forward_ad.unpack_dual(compiled(dual, K, V)).tangent
            expected = forward_ad.unpack_dual(attention(dual, K, V)).tangent
    torch.testing.assert_close(tangent, expected, **CLOSE)
    compiled(Q, K, V)
    assert backend.rewritten[0] and not any(backend.rewritten[1:])
    # Torch 2.15 compiles nothing there.
    assert all("forward-mode" in site.reason for site in backend.sites[1:])


def test_the_whole_model_is_one_graph_under_every_mode():
    compiled = torch.compile(positions, backend=LightBackend(), fullgraph=True)
    for mode in (torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("cpu"), Scaling()):
        with mode, ops.record_stats() as records:
            compiled(Q, K, V)
        assert [record.ran for record in records] == ["sparse"]


def sparse(q, k, v):
    return sparge.attention(q, k, v, scale=0.5, **EXACT_FIELDS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_the_function_inside_a_compile_are_those_of_dense(name):
    transform = TRANSFORMS[name]
    with sdpa_kernel([SDPBackend.MATH] if name == "jvp" else list(REGION_OF_ALL)):
        compiled = torch.compile(lambda: transform(sparse), backend="aot_eager")
        torch.testing.assert_close(compiled(), transform(attention), **CLOSE)


def test_forward_mode_around_a_compiled_call_of_the_function_keeps_the_tangent():
    compiled = torch.compile(
        sparse, backend="aot_eager"
    )  # Inductor before torch 2.15 drops any tangent, of q.sin() too
    with ops.record_stats() as records:
        compiled(Q, K, V)
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = forward_ad.make_dual(Q, torch.ones_like(Q))
            tangents = [forward_ad.unpack_dual(call(dual, K, V)).tangent for call in (compiled, attention)]
        compiled(Q, K, V)
    torch.testing.assert_close(*tangents, **CLOSE)
    assert [record.ran for record in records] == ["sparse", "sparse"]
