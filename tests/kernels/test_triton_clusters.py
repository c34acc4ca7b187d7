"""The GPU kernels' clusters of keys, and the weights of tiles made of them, are those of the torch functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, both_causal, random_qkv
from mask_cases import MASKS
from torch import Tensor
from triton_cases import on_device, poisoned_memory

from sparge_kernels import clusters, masks, predict
from sparge_kernels.triton.keys import prepare_keys
from sparge_kernels.triton.mask import classify_mask
from sparge_kernels.triton.weights import weigh_tiles

assert poisoned_memory
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy in the interpreter, at inf and NaN
]
LIGHT = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
INF, NAN = float("inf"), float("nan")
WEIGHT_ERROR = 0.05  # nats
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def assert_clusters(k: Tensor, v: Tensor, is_causal: bool) -> None:
    """The clusters of predictable tiles are those of clusters.cluster_keys, the others are empty."""
    keys = prepare_keys(on_device(k), on_device(v), is_causal=is_causal, quantized=False, clustered=True)
    codes = keys.clusters.codes.float().cpu().transpose(2, 3)
    scale, log_sizes, spreads = (x.cpu().transpose(2, 3) for x in keys.clusters.numbers.unbind(2))
    centre = keys.means.cpu()[:, :, :1, None]
    centre = centre.masked_fill(~centre.isfinite().all(-1, keepdim=True), 0)
    means, expected = codes * scale[..., None] + centre, clusters.cluster_keys(torch.where(k.isfinite(), k, 0).float())
    usable = keys.flags.cpu()[..., None] == 0
    assert torch.equal(log_sizes.exp().round(), expected.log_sizes.exp().round().masked_fill(~usable, 0))
    real, dim = log_sizes > -INF, k.shape[3]
    torch.testing.assert_close(spreads[real], expected.spreads[real], rtol=1e-4, atol=1e-6)
    error = (means[..., :dim] - expected.means).abs()
    assert (error <= 2**-11 * scale[..., None] + 1e-6 * expected.means.abs())[real].all()
    assert not codes[..., dim:].any()


@settings(LIGHT, max_examples=12)
@given(
    k_len=st.sampled_from([1, 63, 65, 128, 200, 257]), dim=st.sampled_from([1, 3, 31, 40, 64, 128, 256]),
    dtype=DTYPES, batch=st.integers(1, 2), heads=st.integers(1, 2),
    layout=st.sampled_from(sorted(LAYOUTS)), offset=st.sampled_from([0.0, 30.0]), is_causal=st.booleans(),
)  # fmt: skip
def test_clusters_of_keys_of_any_size_type_and_layout(k_len, dim, dtype, batch, heads, layout, offset, is_causal):
    _, k, v = random_qkv(1, k_len, heads=heads, batch=batch, dim=dim, value_dim=2, dtype=dtype)
    if layout != "one-token-expanded":  # all distances are rounding
        assert_clusters(LAYOUTS[layout](k + offset), LAYOUTS[layout](v), is_causal)


def test_equal_keys_are_one_cluster_and_lone_ones_their_own():
    k = torch.zeros(1, 1, 190, 16)
    k[:, :, 70], k[:, :, 100], k[:, :, 101] = 9, -30, -30
    k[:, :, 128:] = torch.arange(62)[:, None] % 2
    assert_clusters(k, k, is_causal=False)


@both_causal
@pytest.mark.parametrize("which", "kv")
def test_tiles_that_cannot_be_predicted_have_no_clusters(which, is_causal):
    tensors = dict(zip("qkv", random_qkv(1, 300), strict=True))
    tensors[which][0, 0, 70, 3], tensors[which][0, 1, 5, 0] = INF, NAN
    assert_clusters(tensors["k"], tensors["v"], is_causal)


def assert_weights(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, mask: Tensor | None = None) -> None:
    """weigh_tiles against clusters.tile_weights, where it says anything."""
    scale, heads = q.shape[3] ** -0.5, q.shape[1]
    keys = prepare_keys(on_device(k), on_device(v), is_causal=is_causal, quantized=False, clustered=True)
    tiles = None if mask is None else classify_mask(on_device(mask), q.shape[2], k.shape[2])
    options = {"is_causal": is_causal, "scale": scale}
    weights = weigh_tiles(on_device(q), on_device(k), keys.clusters, tiles, **options).cpu()
    additive = None if mask is None else masks.additive_mask(mask, torch.float32)
    prediction = predict.predict(q.float(), k.float(), v.float(), mask=additive, predictor="clusters", **options)
    usable = (keys.flags.cpu() == 0).repeat_interleave(heads // k.shape[1], 1)[:, :, None]
    seen = prediction.whole & usable
    torch.testing.assert_close(weights[seen], prediction.scores[seen], rtol=0, atol=WEIGHT_ERROR, equal_nan=True)
    hidden = ~seen if not is_causal else prediction.whole & ~usable
    assert not (weights[hidden] > -INF).any()


@settings(LIGHT, max_examples=12)
@given(
    q_len=st.integers(1, 300), k_len=st.sampled_from([1, 64, 130, 257, 640]), heads=st.sampled_from([(1, 1), (6, 2)]),
    dim=st.sampled_from([16, 40, 64, 128, 256]), dtype=DTYPES, layout=st.sampled_from(sorted(LAYOUTS)),
    gain=st.sampled_from([1.0, 10.0]), offset=st.sampled_from([0.0, 20.0]), is_causal=st.booleans(),
)  # fmt: skip
def test_weights_of_any_call(q_len, k_len, heads, dim, dtype, layout, gain, offset, is_causal):
    q, k, v = random_qkv(q_len, k_len, heads=heads[0], kv_heads=heads[1], dim=dim, value_dim=2, dtype=dtype)
    assert_weights(LAYOUTS[layout](gain * q), LAYOUTS[layout](k + offset * k[:, :1, :1]), v, is_causal)


@pytest.mark.parametrize("name", ["per-head-queries", "padding", "documents", "alibi", "bias-of-keys", "minus-inf"])
def test_weights_under_a_mask(name):
    q, k, v = random_qkv(140, 333, heads=2, kv_heads=1, batch=2, dim=24)
    assert_weights(3 * q, k, v, mask=MASKS[name](2, 2, 140, 333))


@both_causal
@pytest.mark.parametrize("which, change", [("q", NAN), ("q", INF), ("k", NAN), ("v", NAN), ("q", 1e30)])
def test_weights_where_a_number_is_not_finite(which, change, is_causal):
    tensors = dict(zip("qkv", random_qkv(400, 400, heads=2), strict=True))
    tensors[which][0, 0, 150, 3] = change
    assert_weights(*tensors.values(), is_causal)


def test_weights_of_keys_and_queries_at_the_ends_of_fp32():
    q, k, v = random_qkv(130, 200)
    for grow_q, grow_k in ((1e-30, 1e30), (1e18, 1e-18), (1e-42, 1), (0, 1), (1, 0), (1e-20, 1e-20)):
        assert_weights(grow_q * q, grow_k * k, v, is_causal=True)
