"""Arguments, dtypes and layouts through a compile: what is not known to be equal stays dense, dense to the bit."""

import pytest
import torch
import torch.nn.functional as F
from arms import item
from light import CLOSE, Attention, is_rewritten, qkv, run, stays_dense
from torch import nn

SDPA = F.scaled_dot_product_attention
T = 12
MASKS = {
    "bool": torch.rand(T, T) > 0.4,
    "inverted": torch.rand(T, T) < 0.4,
    "additive": torch.randn(T, T),
    "4d": torch.rand(2, 2, T, T) > 0.4,
    "3d-heads": torch.rand(2, T, T) > 0.4,
    "key-padding": torch.rand(2, 1, 1, T) > 0.3,
    "expanded-view": (torch.rand(2, 1, 1, T) > 0.3).expand(2, 2, T, T),
    "row-of-nothing": (torch.arange(T) > 0)[:, None].expand(T, T),
    "all-true-data": torch.ones(T, T, dtype=torch.bool),
}


@item(1, "compiled")
@item(2, "compiled")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_a_mask_of_data_is_never_dropped(mask):
    is_rewritten(lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), *qkv(), mask)
    torch._dynamo.reset()
    is_rewritten(lambda q, k, v, m: SDPA(q, k, v, m), *qkv(), mask)


@item(1, "compiled")
@item(2, "compiled")
def test_a_mask_of_another_dtype_stays_dense_but_for_autocast():
    mask = torch.randn(T, T)
    inputs = qkv(dtype=torch.bfloat16)
    stays_dense(lambda q, k, v, m: SDPA(q, k, v, m), *inputs, mask, reason="attn_mask is torch.float32")
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        is_rewritten(lambda q, k, v, m: SDPA(q, k, v, m), *qkv(), mask, tolerance={"rtol": 2e-2, "atol": 2e-2})


@item(1, "compiled")
def test_a_mask_and_is_causal_together_stay_dense():
    with torch.no_grad():
        try:
            SDPA(*qkv(), MASKS["bool"], is_causal=True)
        except (RuntimeError, ValueError):
            pytest.skip("this torch refuses the call itself")
    stays_dense(lambda q, k, v, m: SDPA(q, k, v, m, is_causal=True), *qkv(), MASKS["bool"], reason="together")


@pytest.mark.parametrize("rank", [2, 3], ids=["2d", "3d"])
@pytest.mark.parametrize("mask", [None, "bool"])
def test_fewer_dimensions_are_rewritten(rank, mask):
    inputs = [x[0] if rank == 3 else x[0, 0] for x in qkv()]
    attn_mask = None if mask is None else MASKS[mask]
    is_rewritten(lambda q, k, v: SDPA(q, k, v, attn_mask), *inputs)


SCALES = {"float": 0.37, "int": 1, "negative": -0.5, "zero": 0.0, "huge": 30.0}


@item(3, "compiled")
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_the_callers_scale_is_used(scale):
    backend = is_rewritten(lambda q, k, v: SDPA(q, k, v, scale=scale), *qkv())
    assert backend.operators()[0].kwargs["scale"] == scale


READ = {"tensor": lambda scale: scale, "item": lambda scale: scale.item()}


@item(3, "compiled")
@pytest.mark.parametrize("read", READ.values(), ids=READ.keys())
def test_a_scale_that_is_a_tensor_is_never_stale(read):
    def function(q, k, v, scale):
        return SDPA(q, k, v, scale=read(scale))

    inputs = qkv()
    _, backend = run(function, *inputs, torch.tensor(0.3))
    compiled = torch.compile(function, backend=backend)
    for scale in (0.3, 0.9, -0.2):
        with torch.no_grad():
            out = compiled(*inputs, torch.tensor(scale))
        torch.testing.assert_close(out, SDPA(*inputs, scale=scale), **CLOSE)


@item(3, "compiled")
@pytest.mark.parametrize("kind", [float, int], ids=["float", "int"])
def test_a_scale_that_changes_between_calls_is_never_stale(kind):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = kind(2)

        def forward(self, q, k, v):
            return SDPA(q, k, v, scale=self.scale / 4 if kind is float else self.scale)

    model, inputs = Scaled(), qkv()
    compiled = torch.compile(model, backend=run(model, *inputs)[1], dynamic=True)
    for scale in (2, 3, 5, 7):
        model.scale = kind(scale)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), model(*inputs), **CLOSE)


@item(7, "compiled")
def test_one_key_head_is_broadcast_over_all_query_heads():
    q, k, v = qkv(heads=6, kv_heads=1)
    is_rewritten(lambda q, k, v: SDPA(q, k, v, is_causal=True), q, k, v)


REFUSED = {
    "5d": (lambda q, k, v: SDPA(q[None], k[None], v[None]), "5 dimensions"),
    "batch-broadcast": (lambda q, k, v: SDPA(q, k[:1], v[:1]), "batch sizes"),
    "query-broadcast": (lambda q, k, v: SDPA(q[:, :1], k, v), "1 query heads over 2 key heads"),
    "float64": (lambda q, k, v: SDPA(q.double(), k.double(), v.double()), "float64"),
    "head-dim-over-256": (lambda q, k, v: SDPA(*(x.repeat(1, 1, 1, 33) for x in (q, k, v))), "264"),
    "meta": (lambda q, k, v: SDPA(*(torch.empty_like(x, device="meta") for x in (q, k, v))).shape[0] + q, "meta"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_kernel_cannot_do_stays_dense(function, reason):
    stays_dense(function, *qkv(), reason=reason)


@item(8, "compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("where", ["around", "inside"])
def test_under_autocast_the_output_has_the_dtype_of_dense(dtype, where):
    def inside(q, k, v):
        with torch.autocast("cpu", dtype=dtype):
            return SDPA(q, k, v)

    q, k, v = qkv()
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    if where == "inside":
        is_rewritten(inside, q, k.to(dtype), v, tolerance=tolerance)
        return
    with torch.autocast("cpu", dtype=dtype):
        is_rewritten(SDPA, q, k, v, tolerance=tolerance)


@item(8, "compiled")
def test_autocast_switched_off_inside_keeps_float32():
    def function(q, k, v):
        with torch.autocast("cpu", enabled=False):
            return SDPA(q, k, v)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        is_rewritten(function, *qkv())


@item(8, "compiled")
def test_float64_under_autocast_stays_dense():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stays_dense(lambda q, k, v: SDPA(q, k, v), *qkv(dtype=torch.float64))


@item(8, "compiled")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_a_low_precision_model_is_rewritten_in_its_dtype(dtype):
    is_rewritten(
        Attention().to(dtype).eval(), torch.randn(2, 6, 16, dtype=dtype), tolerance={"rtol": 0.02, "atol": 0.02}
    )


@item(9, "compiled")
def test_a_view_of_the_output_that_relies_on_the_strides_works():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    is_rewritten(lambda q, k, v: SDPA(q, k, v).transpose(1, 2).view(2, T, -1), q, k, v)


def test_values_may_have_another_head_dim():
    q, k, _ = qkv()
    is_rewritten(lambda q, k, v: SDPA(q, k, v), q, k, torch.randn(2, 2, T, 5))


@item(6, "compiled")
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)], ids=["no-queries", "no-keys"])
def test_empty_inputs_give_what_dense_gives(sizes):
    q, k, v = torch.randn(1, 2, sizes[0], 8), *torch.randn(2, 1, 2, sizes[1], 8)
    out, _ = run(lambda q, k, v: SDPA(q, k, v), q, k, v)
    torch.testing.assert_close(out, SDPA(q, k, v), equal_nan=True)


@item(9, "compiled")
def test_an_output_that_is_transposed_in_place_stays_dense():
    def function(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v)
        out.transpose_(1, 2)
        return out.transpose(1, 2).reshape(2, 12, -1) + 0

    stays_dense(function, *qkv(), reason="in place")
