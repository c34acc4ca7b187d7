"""The GPU kernels select the tiles that predict.py selects, and list them in order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEFAULT, HALF, KEEP_ALL, both_causal, random_qkv
from mask_cases import MASKS
from stages import TAU_ROUNDING, assert_rounding_decides
from torch import Tensor
from triton_cases import DEVICE, on_device, poisoned_memory

from sparge_kernels import masks, predict
from sparge_kernels.thresholds import K_TILE, NEVER_SKIP, Q_TILE, Thresholds, pack
from sparge_kernels.tiles import tile_count
from sparge_kernels.triton import select
from sparge_kernels.triton.keys import KeyTiles, prepare_keys
from sparge_kernels.triton.mask import BIASED, HIDDEN, OPEN, PARTIAL, MaskTiles, classify_mask
from sparge_kernels.triton.queries import QueryTiles, prepare_queries
from sparge_kernels.triton.weights import weigh_tiles
from workloads import smooth_field

assert poisoned_memory
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy in the interpreter, at inf and NaN
]
LIGHT = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
INF, NAN = float("inf"), float("nan")
MOST = Thresholds(topk=None, cdf=0.9, similarity=-1.0, pv=None)
BOUNDARY = 0.1  # nats between weights that rounding may exchange
both_predictors = pytest.mark.parametrize("predictor", ["clusters", "sparge"])
KINDS = [int(getattr(kind, "value", kind)) for kind in (HIDDEN, OPEN, BIASED, PARTIAL)]


def on_gpu_numbers(thresholds: list[Thresholds]) -> Tensor:
    return torch.tensor(pack(thresholds), dtype=torch.float64).view(-1, 4).to(DEVICE)


def assert_lists(selection: select.Selection, kept: Tensor, exact: Tensor, visible: Tensor) -> None:
    """Lists, counts and order that say which tiles are kept, exact and visible, bool [B, H, nQ, nK]."""
    tiles, counts, order = (x.cpu() for x in (selection.tiles, selection.counts, selection.order))
    plain = kept & ~exact
    exact = kept & exact
    assert torch.equal(counts, torch.stack([plain.sum(-1), exact.sum(-1), visible.sum(-1)], -1).int())
    for b, h in torch.cartesian_prod(*map(torch.arange, kept.shape[:2])).tolist():
        for i in range(kept.shape[2]):
            wanted = plain[b, h, i].nonzero().flatten().tolist() + exact[b, h, i].nonzero().flatten().tolist()
            assert tiles[b, h, i, : len(wanted)].tolist() == wanted
        lengths = kept[b, h].sum(-1).tolist()
        assert order[b, h].tolist() == sorted(range(len(lengths)), key=lambda i: (-lengths[i], -i))


def listed(selection: select.Selection) -> Tensor:
    """The kept tiles, bool [B, H, nQ, nK]; none is listed twice."""
    kept = selection.kept().cpu()
    assert torch.equal(kept.sum(-1), selection.counts.cpu()[..., :2].sum(-1))
    return kept


def assert_rounding_exchanges(
    actual: Tensor, kept: Tensor, prediction: predict.Prediction, threshold: Thresholds
) -> None:
    """Tiles that differ from `kept` weigh as much as the largest that it drops or the smallest it keeps, or nearly."""
    weights, candidates = (
        prediction.scores,
        prediction.whole & (prediction.k_similarity >= threshold.similarity)[:, :, None],
    )
    largest_dropped = weights.masked_fill(kept | ~candidates, -INF).amax(-1, keepdim=True)
    smallest_kept = weights.masked_fill(~kept | ~candidates, INF).amin(-1, keepdim=True)
    near = (weights >= largest_dropped - BOUNDARY) & (weights <= smallest_kept + BOUNDARY)
    assert (near | (actual == kept)).all()


def assert_selects_as_specified(
    q: Tensor, k: Tensor, v: Tensor, threshold: Thresholds, mask: Tensor | None = None, is_causal: bool = False,
    predictor: str = "clusters",
) -> Tensor:  # fmt: skip
    """All of stage 1 of the GPU kernels against predict.select_tiles. Returns the kept tiles."""
    (batch, heads, q_len, dim), k_len, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    clustered = predictor == "clusters"
    keys = prepare_keys(on_device(k), on_device(v), is_causal=is_causal, quantized=True, clustered=clustered)
    queries = prepare_queries(on_device(q), keys.centre, group, sign=1)
    mask_tiles = None if mask is None else classify_mask(on_device(mask), q_len, k_len)
    options = {"is_causal": is_causal, "scale": dim**-0.5}
    weights = weigh_tiles(on_device(q), keys.clusters, mask_tiles, k_len=k_len, **options) if clustered else None
    selection = select.select_tiles(
        queries, keys, mask_tiles, on_gpu_numbers([threshold] * heads), q_len=q_len, k_len=k_len, weights=weights,
        **options,
    )  # fmt: skip
    shape = (batch, heads, q_len, k_len)
    if mask is None:
        tiles = masks.causal_tiles(q_len, k_len, is_causal, torch.float32, q.device)
    else:
        additive = masks.additive_mask(mask, torch.float32).expand(shape)
        tiles = masks.mask_tiles(additive)
    wide = (q.float(), k.float(), v.float())
    prediction = predict.predict(*wide, mask=None if mask is None else additive, predictor=predictor, **options)
    kept = torch.stack([prediction.keep(head, threshold) for head in range(heads)], 1)
    actual = listed(selection)
    if not torch.equal(actual, kept):
        if clustered:
            assert_rounding_exchanges(actual, kept, prediction, threshold)
        else:
            assert_rounding_decides(actual, *wide, [threshold], attn_mask=mask, predictor=predictor, **options)
    ragged = torch.arange(kept.shape[-1]) * K_TILE + K_TILE > k_len
    flagged = (keys.flags.cpu() != 0).repeat_interleave(group, 1)[:, :, None]
    exact = tiles.partial | tiles.biased | ragged | flagged
    assert_lists(selection, actual, exact.expand_as(kept), (~tiles.hidden).expand_as(kept))
    return actual


@both_causal
@both_predictors
@pytest.mark.parametrize("threshold", [HALF, DEFAULT], ids=["half", "default"])
@pytest.mark.parametrize("q_len, k_len", [(1, 1), (1, 257), (257, 1), (129, 321), (400, 130)], ids=str)
def test_lengths(is_causal, predictor, threshold, q_len, k_len):
    q, k, v = random_qkv(q_len, k_len, heads=2, kv_heads=1, dim=24)
    assert_selects_as_specified(3 * q, k, v, threshold, is_causal=is_causal, predictor=predictor)


@settings(LIGHT, max_examples=16)
@given(
    q_len=st.integers(1, 257), k_len=st.integers(1, 400), heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    dim=st.sampled_from([1, 17, 64, 130]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    topk=st.sampled_from([None, 0.1, 0.5]), cdf=st.sampled_from([0.3, 0.9, 1.0]),
    similarity=st.sampled_from([-1.0, 0.02, 0.03]), is_causal=st.booleans(),
    predictor=st.sampled_from(["clusters", "sparge"]),
)  # fmt: skip
def test_sizes_types_and_thresholds(q_len, k_len, heads, dim, dtype, topk, cdf, similarity, is_causal, predictor):
    q, k, v = random_qkv(q_len, k_len, heads=heads[0], kv_heads=heads[1], dim=dim, value_dim=2, dtype=dtype)
    threshold = Thresholds(topk, cdf, similarity, None)
    assert_selects_as_specified(q, k, v, threshold, is_causal=is_causal, predictor=predictor)


@both_predictors
@pytest.mark.parametrize("name", ["per-head-queries", "padding", "documents", "alibi", "bias-of-keys", "minus-inf"])
def test_masks(name, predictor):
    q, k, v = random_qkv(140, 333, heads=2, batch=2, dim=8)
    assert_selects_as_specified(q, k, v, MOST, mask=MASKS[name](2, 2, 140, 333), predictor=predictor)


@both_causal
@both_predictors
@pytest.mark.parametrize("threshold", [Thresholds(None, 0.8, 0.5, None), replace(HALF, topk=0.07)], ids=["cdf", "topk"])
def test_smooth_fields_where_prediction_pays(is_causal, predictor, threshold):
    inputs = smooth_field((1, 12, 128), heads=1, gain=8.0, offset=0.0, correlation=(0.5, 1.0, 32.0))
    kept = assert_selects_as_specified(*inputs, threshold, is_causal=is_causal, predictor=predictor)
    assert kept.float().mean() < 0.75


@both_causal
@both_predictors
@pytest.mark.parametrize("which", "qkv")
def test_a_number_that_is_not_finite_spoils_the_prediction_of_its_own_tiles(which, predictor, is_causal):
    tensors = dict(zip("qkv", random_qkv(300, 300, dim=4), strict=True))
    tensors[which][0, 0, 200, 3], tensors[which][0, 1, 70, 0] = INF, NAN
    for threshold in (replace(HALF, topk=0.1), KEEP_ALL):
        assert_selects_as_specified(*tensors.values(), threshold, is_causal=is_causal, predictor=predictor)


def crafted(scores: Tensor, q_similarity: Tensor, k_similarity: Tensor, kind: Tensor, flags: Tensor):
    """Tiles whose proxy scores are `scores` [nQ, nK]: the bias of a mask over means of zero.

    With a scale of -1 the means give -0, which adds nothing, not even to -0.
    """
    n_q, n_k = scores.shape
    zeros = torch.zeros(1, 1, max(n_q, n_k), 32)
    queries = QueryTiles(None, None, None, None, zeros[:, :, :n_q].contiguous().to(DEVICE), q_similarity.to(DEVICE))
    keys = KeyTiles(
        None, None, None, zeros[:, :, :n_k].contiguous().to(DEVICE), k_similarity.to(DEVICE), flags.to(DEVICE)
    )
    return queries, keys, MaskTiles(kind.to(torch.int8).to(DEVICE), scores[None, None].to(DEVICE))


@settings(LIGHT, max_examples=60)
@given(
    n_q=st.integers(1, 2),
    n_k=st.sampled_from([1, 2, 31, 32, 33, 64, 100, 257, 513, 1000]),
    numbers=st.sampled_from(
        [
            None,
            [0.0, -0.0],
            [1.0, 2.0],
            [-1.5, -0.0, 0.0, 1e-45, -1e-45, 3.0],
            [-INF, 0.0, -100.0],
            [-INF],
            [INF, 0.0],
            [NAN, 1.0],
            [-3.4e38, 3.4e38, -1.0],
        ]
    ),
    topk=st.sampled_from([None, None, 0.01, 0.07, 0.3, 1 / 3, 0.55, 1.0]),
    cdf=st.sampled_from([1e-6, 0.3, 0.5, 0.9, 0.999, 1.0]),
    similarity=st.sampled_from([-1.0, 0.5]),
    weighed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_scores_similarities_and_kinds(n_q, n_k, numbers, topk, cdf, similarity, weighed, seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(values: list[float], *shape: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    scores = 3 * torch.randn(n_q, n_k, generator=generator) if numbers is None else pick(numbers, n_q, n_k)
    kind = pick(KINDS + 5 * KINDS[1:2], 1, 1, n_q, n_k)
    q_similarity, k_similarity = pick([0.4, 0.5, 0.9, NAN], 1, 1, n_q), pick([0.5, 0.6, 0.9, 0.4, NAN], 1, 1, n_k)
    flags = pick([0, 0, 0, 1, 4], 1, 1, n_k).to(torch.int8)
    threshold = Thresholds(topk, cdf, similarity, None)
    k_len = n_k * K_TILE - seed % 2
    tiles = crafted(scores, q_similarity, k_similarity, kind, flags)
    weights = scores[None, None].clone().to(DEVICE) if weighed else None
    selection = select.select_tiles(
        *tiles, on_gpu_numbers([threshold]), is_causal=False, scale=-1.0, q_len=n_q * Q_TILE, k_len=k_len,
        weights=weights,
    )  # fmt: skip

    hidden, partial, biased = (kind[0, 0] == one for one in (KINDS[0], KINDS[3], KINDS[2]))
    whole, predictable_q = ~hidden & ~partial, (q_similarity[0, 0] >= (-INF if weighed else similarity))[:, None]
    predictable_k = k_similarity[0, 0] >= similarity

    def kept(by: float) -> Tensor:
        moved = (
            threshold if topk is not None or cdf >= 1 else replace(threshold, cdf=min(max(cdf + by, 1e-9), 1 - 1e-7))
        )
        largest = (predict.drop_smallest if weighed else predict.keep_largest)(scores, whole & predictable_k, moved)
        return partial | whole & (largest | ~predictable_q | ~predictable_k)

    actual = listed(selection)
    if not torch.equal(actual[0, 0], kept(0)):
        assert not (kept(-TAU_ROUNDING) & ~actual[0, 0]).any() and not (actual[0, 0] & ~kept(TAU_ROUNDING)).any()
        assert topk is None and cdf < 1
    ragged = torch.arange(n_k) * K_TILE + K_TILE > k_len
    exact = partial | biased | ragged | (flags[0, 0] != 0)
    assert_lists(selection, actual, exact[None, None].expand_as(actual), ~hidden[None, None])


def test_the_longest_rows():
    n_k = select.MAX_K_TILES
    scores = torch.randn(1, n_k, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 1, n_k)
    tiles = crafted(scores, ones[..., :1], ones, ones[:, :, None], 0 * ones.to(torch.int8))
    options = {"is_causal": False, "scale": 1.0, "q_len": 1}
    threshold = Thresholds(0.37, 1.0, 0.0, None)
    selection = select.select_tiles(*tiles, on_gpu_numbers([threshold]), k_len=n_k * K_TILE, **options)
    kept = predict.keep_largest(scores, scores == scores, threshold)[None, None]
    assert torch.equal(listed(selection), kept)
    assert_lists(selection, kept, torch.zeros_like(kept), torch.ones_like(kept))
    with pytest.raises(ValueError, match="at most 524288 are allowed"):
        select.select_tiles(*tiles, on_gpu_numbers([threshold]), k_len=n_k * K_TILE + 1, **options)


def test_shares_round_up_as_the_references_do():
    """ceil(topk * n), where products like 0.07 * 100 are just above a whole number."""
    candidates = torch.tensor([1, 14, 25, 50, 75, 100])
    scores = torch.arange(100.0).flip(0).expand(len(candidates), 100).contiguous()
    kind = (torch.arange(100) < candidates[:, None])[None, None].int()
    ones = torch.ones(1, 1, 100)
    tiles = crafted(scores, ones[..., : len(candidates)], ones, kind, 0 * ones.to(torch.int8))
    for topk in (0.07, 0.28, 0.56):
        selection = select.select_tiles(
            *tiles, on_gpu_numbers([Thresholds(topk, 1.0, 0.0, None)]), is_causal=False, scale=1.0,
            q_len=len(candidates) * Q_TILE, k_len=100 * K_TILE,
        )  # fmt: skip
        allowed = (candidates.double() * topk - 1e-6).ceil().clamp(min=1)
        assert torch.equal(selection.counts[0, 0, :, 0].cpu(), allowed.int())


@pytest.mark.parametrize("n_q", [1, 31, 33, 129, 300])
def test_order_of_many_query_tiles_with_equal_counts(n_q):
    counts = torch.randint(3, (2, 2, n_q, 3), generator=torch.Generator().manual_seed(n_q), dtype=torch.int32)
    order, lengths = select.order_tiles(counts.to(DEVICE)).cpu(), counts[..., :2].sum(-1)
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        assert order[b, h].tolist() == sorted(range(n_q), key=lambda i: (-int(lengths[b, h, i]), -i))


@both_causal
@pytest.mark.parametrize("n_q, n_k, dim", [(1, 1, 1), (33, 65, 40), (3, 200, 256)])
def test_scores_of_tile_means(n_q, n_k, dim, is_causal):
    generator = torch.Generator().manual_seed(0)
    padded = max(32, 1 << (dim - 1).bit_length())
    q, k = torch.randn(2, 6, n_q, padded, generator=generator), torch.randn(2, 2, n_k, padded, generator=generator)
    q[..., dim:], k[..., dim:] = 0, 0
    similarity = torch.zeros(2, 2, n_k, device=DEVICE)
    queries = QueryTiles(None, None, None, None, q.to(DEVICE), similarity)
    keys = KeyTiles(None, None, None, k.to(DEVICE), similarity, similarity)
    scores = select.score_tiles(queries, keys, None, is_causal=is_causal, scale=-0.3).cpu()
    expected = predict.proxy_scores(q, k.repeat_interleave(3, 1), -0.3)
    seen = torch.ones(n_q, n_k, dtype=torch.bool)
    if is_causal:
        seen = torch.arange(n_k) * K_TILE <= torch.arange(n_q)[:, None] * Q_TILE + Q_TILE - 1
    torch.testing.assert_close(scores[..., seen], expected[..., seen], rtol=1e-5, atol=1e-5)


def test_stage_2_and_the_order_of_heads_play_no_part():
    """Thresholds are per query head."""
    q, k, v = random_qkv(300, 700, heads=3)
    keys = prepare_keys(on_device(k), on_device(v), is_causal=False, quantized=True)
    queries = prepare_queries(on_device(q), keys.centre, 1, sign=1)
    thresholds = [HALF, replace(MOST, pv=NEVER_SKIP), KEEP_ALL]
    selection = select.select_tiles(
        queries, keys, None, on_gpu_numbers(thresholds), is_causal=False, scale=0.25, q_len=300, k_len=700,
    )  # fmt: skip
    kept = predict.select_tiles(q, k, v, thresholds=thresholds, is_causal=False, scale=0.25, predictor="sparge")
    assert torch.equal(listed(selection), kept)
    assert kept.shape[-1] == tile_count(700, K_TILE)
