"""The native kernel's clusters of keys and weights of tiles are those of clusters.py, and so is what it keeps."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KEEP_ALL, LAYOUTS, both_causal, every_dtype, random_qkv
from mask_cases import MASKS
from stages import assert_same_stages, assert_weights_decide, native_stages, reference_stages, weight_error
from torch import Tensor

from sparge_kernels import clusters, predict
from sparge_kernels.clusters import CLUSTERS
from sparge_kernels.cpu import native
from sparge_kernels.masks import additive_mask
from sparge_kernels.thresholds import K_TILE, Q_TILE, Thresholds
from sparge_kernels.tiles import tile_count
from workloads import WORKLOADS, smooth_field

LIGHT = settings(deadline=None, derandomize=True, max_examples=80)
INF, NAN = float("inf"), float("nan")
LIKE_DEFAULT = Thresholds(None, 0.95, 0.15, None)
DIMS = (16, 40, 64, 128)


@dataclass(frozen=True)
class Clustered:
    """One kv head of K, and the weights of one query tile, as sparge_clustered gives them."""

    means: Tensor  # [nK, CLUSTERS, D]
    sizes: Tensor  # [nK, CLUSTERS]
    spreads: Tensor  # [nK, CLUSTERS]
    weights: Tensor  # [nK], nats


def clustered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    tile: int = 0,
    head: int = 0,
) -> Clustered:
    """The stage of one query head of batch 0."""
    options = {"is_causal": is_causal, "scale": q.shape[3] ** -0.5 if scale is None else scale, "precision": "int8"}
    out = torch.empty(0, 0, 0, 0)
    call = native.describe(q, k, v, [KEEP_ALL] * q.shape[1], attn_mask, **options, predictor="clusters", out=out)
    count = tile_count(k.shape[2], K_TILE)
    shapes = ((count, CLUSTERS, q.shape[3]), (count, CLUSTERS), (count, CLUSTERS), (count,))
    results = [torch.empty(shape) for shape in shapes]
    indices = (0, head // (q.shape[1] // k.shape[1]), head)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in results]
    library = native.library()
    assert not library.sparge_clustered(
        ctypes.byref(call), *map(ctypes.c_int64, indices), ctypes.c_int(tile), *pointers
    )
    return Clustered(*results)


def assert_same_clusters(actual: Clustered, k: Tensor) -> None:
    """Of one head k [Sk, D]; in any order: of two keys left, either may be the farther one."""
    expected = clusters.cluster_keys(k.float())
    wanted = (expected.means, expected.log_sizes.exp(), expected.spreads)
    found, wanted = (_in_order(*some) for some in ((actual.means, actual.sizes, actual.spreads), wanted))
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=0)
    real = found[1] > 0
    torch.testing.assert_close(found[0][real], wanted[0][real], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(found[2][real], wanted[2][real], rtol=1e-4, atol=1e-7)


def _in_order(means: Tensor, sizes: Tensor, spreads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each tile's clusters by the first channel of their means, those of no keys last."""
    order = means[..., 0].masked_fill(sizes == 0, INF).argsort(-1)
    return means.gather(1, order[..., None].expand_as(means)), sizes.gather(1, order), spreads.gather(1, order)


def assert_same_weights(actual: Tensor, q: Tensor, k: Tensor, v: Tensor, *, tile: int, head: int, **options) -> Tensor:
    """Of the tiles that have a part; the others have none in the native kernel either. Returns the weights."""
    mask = options.pop("attn_mask", None)
    mask = None if mask is None else additive_mask(mask, torch.float32)
    scale = options.get("scale") or q.shape[3] ** -0.5
    wide = [x.float() for x in (q, k, v)]
    known = predict.predict(*wide, mask=mask, **{**options, "scale": scale}, predictor="clusters")
    finite = predict.finite_tiles(wide[1], K_TILE) & predict.finite_tiles(wide[2], K_TILE)
    part = known.whole[0, head, tile] & finite[0, head // (q.shape[1] // k.shape[1])]
    expected = known.scores[0, head, tile]
    assert (actual[~part] == -INF).all()
    torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=weight_error(q, k, scale), equal_nan=True)
    return expected[part]


@LIGHT
@given(
    q_len=st.integers(1, 300),
    k_len=st.integers(1, 300),
    dim=st.sampled_from([1, 3, 16, 17, 40, 64, 128, 256]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    scale=st.sampled_from([None, 1.0, -0.4]),
    mask=st.sampled_from(["none", "is_causal", *MASKS]),
    seed=st.integers(0, 5),
)
def test_clusters_and_weights(q_len, k_len, dim, heads, dtype, layout, scale, mask, seed):
    tensors = random_qkv(q_len, k_len, heads=heads[0], kv_heads=heads[1], dim=dim, value_dim=3, dtype=dtype, seed=seed)
    if layout == "one-token-expanded":  # what equal keys are apart must not be rounding
        tensors = [(x * 16).round() / 16 for x in tensors]
    q, k, v = (LAYOUTS[layout](x) for x in tensors)
    head, tile = seed % heads[0], seed % tile_count(q_len, Q_TILE)
    options = {"is_causal": mask == "is_causal", "scale": scale}
    if mask in MASKS:
        options["attn_mask"] = MASKS[mask](1, heads[0], q_len, k_len)
    actual = clustered(q, k, v, **options, tile=tile, head=head)
    if dim > 1 or dtype == torch.float32:  # else distances may be equal
        assert_same_clusters(actual, k[0, head // (heads[0] // heads[1])])
        assert_same_weights(actual.weights, q, k, v, **options, tile=tile, head=head)


def test_a_lone_key_is_a_cluster_and_equal_keys_are_one():
    q, k, v = random_qkv(128, 192, heads=1, dim=64)
    k *= 0.1
    k[:, :, 70] = 3
    k[:, :, 128:] = k[:, :, 128:129]
    actual = clustered(q, k, v)
    assert 1 in actual.sizes[1] and sorted(actual.sizes[2].tolist()) == [0, 0, 0, 64]
    alone = actual.sizes[1] == 1
    torch.testing.assert_close(actual.means[1][alone][0], k[0, 0, 70])
    assert (actual.spreads[1][alone] == 0).all()


@both_causal
@every_dtype
@pytest.mark.parametrize("dim", DIMS)
def test_weights_on_a_smooth_field(is_causal, dtype, dim):
    q, k, v = (x.to(dtype)[:, :, :2000] for x in smooth_field((2, 16, 64), heads=1, head_dim=dim, gain=4.0))
    for tile in (1, 9, 15):
        actual = clustered(q, k, v, is_causal=is_causal, tile=tile)
        weights = assert_same_weights(actual.weights, q, k, v, is_causal=is_causal, tile=tile, head=0)
        assert weights.max() - weights.min() > 0.5
        assert (actual.weights[: len(weights)] - weights).abs().mean() < 0.01  # causal: the past comes first


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workloads_keep_the_same_tiles(name, dtype):
    """Nearly: a weight within rounding of the limit may fall on either side."""
    work = WORKLOADS[name](2048)
    q, k, v = (x.to(dtype) for x in (work.q, work.k, work.v))
    actual = native_stages(q, k, v, [LIKE_DEFAULT], is_causal=work.is_causal)
    expected = reference_stages(q, k, v, [LIKE_DEFAULT], is_causal=work.is_causal)
    assert_weights_decide(actual.kept, q, k, v, [LIKE_DEFAULT], is_causal=work.is_causal)
    assert (actual.kept != expected.kept).float().mean() <= 0.02


@pytest.mark.parametrize(
    "threshold", [LIKE_DEFAULT, Thresholds(0.3, 1.0, -1.0, None), Thresholds(None, 0.7, -1.0, None)]
)
@pytest.mark.parametrize("dim", DIMS)
@every_dtype
@both_causal
def test_tiles_are_dropped_as_in_the_reference(is_causal, dtype, dim, threshold):
    q, k, v = (x.to(dtype) for x in smooth_field((3, 7, 65), heads=4, head_dim=dim, gain=6.0))
    k, v = k[:, ::2], v[:, ::2]
    actual = native_stages(q, k, v, [threshold], is_causal=is_causal)
    assert_weights_decide(actual.kept, q, k, v, [threshold], is_causal=is_causal)
    assert actual.density.min() < 0.99


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_tiles_under_a_mask_are_dropped_as_in_the_reference(mask):
    q, k, v = smooth_field((2, 5, 100), gain=4.0)
    assert_same_stages(q, k, v, [LIKE_DEFAULT], attn_mask=mask(1, 2, 1000, 1000))


def _nan_query(q, k, v):
    q[:, :, 130, 3] = NAN


def _infinite_query(q, k, v):
    q[:, :, 130] = -INF


def _scores_overflow(q, k, v):
    q[:, :, 130] = 3e38


def _squares_overflow(q, k, v):
    q[:, :, 130] *= 1e25


def _spreads_overflow(q, k, v):
    k[:, :, 64:128] *= 1e25


def _nan_key(q, k, v):
    k[:, :, 70, 2] = NAN


def _infinite_value(q, k, v):
    v[:, :, 70, 2] = INF


def _nan_on_the_diagonal(q, k, v):
    k[:, :, 200, 2] = NAN


@both_causal
@pytest.mark.parametrize(
    "spoil",
    [
        _nan_query,
        _infinite_query,
        _scores_overflow,
        _squares_overflow,
        _spreads_overflow,
        _nan_key,
        _infinite_value,
        _nan_on_the_diagonal,
    ],
    ids=lambda spoil: spoil.__name__.strip("_"),
)
def test_what_cannot_be_predicted_is_kept(spoil, is_causal):
    q, k, v = smooth_field((2, 10, 64), heads=1, gain=5.0)
    spoil(q, k, v)
    threshold = Thresholds(None, 0.7, -1.0, None)
    actual = native_stages(q, k, v, [threshold], is_causal=is_causal)
    assert_weights_decide(actual.kept, q, k, v, [threshold], is_causal=is_causal)
    if is_causal and spoil is not _spreads_overflow:  # else a key that is no number leaves no tile a similarity
        assert actual.density < 0.97
