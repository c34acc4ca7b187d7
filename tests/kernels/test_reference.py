"""The specification's stages, each against an independent computation."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEFAULT, KEEP_ALL, both_causal, both_precisions, dense, random_qkv, relative_l1

from sparge_kernels import predict, quantize, reference, tiles
from sparge_kernels.thresholds import K_TILE, Q_TILE, Thresholds
from workloads import smooth_field

LENGTHS = st.integers(1, 300)
LIGHT = settings(deadline=None, derandomize=True, max_examples=20)


@LIGHT
@given(LENGTHS, LENGTHS, st.sampled_from([(3, 1), (3, 3), (4, 2), (7, 1)]), st.booleans())
def test_keeping_all_without_quantization_is_dense_attention(q_len, k_len, heads, is_causal):
    q, k, v = (x.double() for x in random_qkv(q_len, k_len, heads=heads[0], kv_heads=heads[1], value_dim=8))
    result = reference.attention(q, k, v, thresholds=[KEEP_ALL], is_causal=is_causal, enable_gqa=True, precision="none")
    torch.testing.assert_close(result.output, dense(q, k, v, is_causal), rtol=1e-5, atol=1e-5)
    assert (result.density == 1).all()


@LIGHT
@given(st.integers(1, 300), st.integers(8, 300), st.booleans())
def test_int8_costs_less_than_two_percent(q_len, k_len, is_causal):
    q, k, v = random_qkv(q_len, k_len, dim=32)
    output = reference.attention(q, k, v, thresholds=[KEEP_ALL], is_causal=is_causal).output
    assert relative_l1(output, dense(q, k, v, is_causal)) < 0.02


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 200])
def test_tile_means_are_means_of_real_tokens(length):
    x = torch.randn(2, 3, length, 5)
    means = predict.tile_means(x, K_TILE)
    for j, part in enumerate(x.split(K_TILE, dim=2)):
        torch.testing.assert_close(means[:, :, j], part.mean(2))


@pytest.mark.parametrize("length", [1, 64, 100, 129])
def test_self_similarity_is_the_mean_of_the_gram_matrix(length):
    x = torch.randn(1, 1, length, 5) + 1
    similarity = predict.self_similarity(x, K_TILE)
    for j, part in enumerate(x[0, 0].split(K_TILE)):
        unit = torch.nn.functional.normalize(part, dim=-1)
        torch.testing.assert_close(similarity[0, 0, j], (unit @ unit.T).mean())


def test_zero_rows_lower_the_similarity_and_give_no_nan():
    x = torch.ones(1, 1, 64, 8)
    x[:, :, 32:] = 0
    torch.testing.assert_close(predict.self_similarity(x, K_TILE), torch.tensor([[[0.25]]]))
    assert predict.self_similarity(torch.zeros(1, 1, 70, 8), K_TILE).tolist() == [[[0.0, 0.0]]]


def test_causal_centres_look_at_no_later_key():
    k = torch.randn(1, 1, 300, 4)
    centres = predict.key_centres(predict.tile_means(k, K_TILE), 300, is_causal=True)
    for j in range(5):
        torch.testing.assert_close(centres[0, 0, j], k[0, 0, : (j + 1) * K_TILE].mean(0))
    full = predict.key_centres(predict.tile_means(k, K_TILE), 300, is_causal=False)
    torch.testing.assert_close(full[0, 0], k[0, 0].mean(0).expand(5, 4))


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9, 0.98])
def test_kept_mass_reaches_tau_with_no_tile_to_spare(tau):
    proxy = torch.randn(1, 40, 50) * 2
    weights = proxy.softmax(-1)
    kept = predict.keep_largest(proxy, torch.ones_like(proxy, dtype=torch.bool), Thresholds(None, tau, 0, None))
    mass = (weights * kept).sum(-1)
    least = weights.masked_fill(~kept, 2).amin(-1)
    assert (mass >= tau - 1e-6).all()
    assert (mass - least < tau + 1e-6).all()
    assert (weights.masked_fill(kept, -1).amax(-1) <= least).all()


@pytest.mark.parametrize("topk", ["0.001", "0.07", "0.09", "0.3", "0.5", "1.0"])
@pytest.mark.parametrize("tiles_count", [1, 10, 50, 100, 600, 1400])
def test_topk_keeps_the_best_share_rounded_up(topk, tiles_count):
    proxy = torch.randn(1, 3, tiles_count)
    kept = predict.keep_largest(proxy, torch.ones_like(proxy, dtype=torch.bool), Thresholds(float(topk), 1.0, 0, None))
    assert kept.sum(-1).tolist() == [[math.ceil(Fraction(topk) * tiles_count)] * 3]
    assert (proxy.masked_fill(kept, -torch.inf).amax(-1) < proxy.masked_fill(~kept, torch.inf).amin(-1)).all()


def test_equal_tiles_are_taken_from_the_left_and_others_never():
    candidates = torch.tensor([[[False, True, True, False, True]]])
    kept = predict.keep_largest(torch.zeros(1, 1, 5), candidates, Thresholds(0.5, 1.0, 0, None))
    assert kept.tolist() == [[[False, True, True, False, False]]]
    underflow = torch.tensor([[[0.0, -500.0, 0.0, 0.0, 0.0]]])
    kept = predict.keep_largest(underflow, candidates, Thresholds(1.0, 1.0, 0, None))
    assert torch.equal(kept, candidates)


@pytest.mark.parametrize("q_len, k_len", [(300, 300), (70, 300), (300, 70), (1, 65), (129, 64)])
@both_causal
def test_past_and_diagonal_tiles_follow_the_mask(q_len, k_len, is_causal):
    visible = reference.visible_pairs(q_len, k_len, is_causal, torch.device("cpu"))
    past = tiles.past_tiles(q_len, k_len, is_causal, visible.device)
    diagonal = tiles.diagonal_tiles(q_len, k_len, is_causal, visible.device)
    for i, rows in enumerate(visible.split(Q_TILE)):
        for j, tile in enumerate(rows.split(K_TILE, dim=1)):
            q_last, k_last = i * Q_TILE + len(rows) - 1, j * K_TILE + tile.shape[1] - 1
            overlap = is_causal and j * K_TILE <= q_last and k_last >= i * Q_TILE
            assert bool(diagonal[i, j]) == overlap
            assert bool(past[i, j]) == (bool(tile.all()) and not overlap)
            assert bool(past[i, j] | diagonal[i, j]) == bool(tile.any())


def test_the_causal_diagonal_and_tile_zero_are_always_kept():
    q, k, v = smooth_field((2, 8, 128), heads=1)
    kept = reference.attention(q, k, v, thresholds=[DEFAULT], is_causal=True).kept[0, 0]
    diagonal = tiles.diagonal_tiles(q.shape[2], k.shape[2], True, q.device)
    assert (kept | ~diagonal).all()
    assert kept[:, 0].all()
    assert not kept.all()


def test_unpredictable_tiles_are_kept_whole():
    """The paper asks both Q and K tiles whether they are predictable, "clusters" K tiles only."""
    q, k, v = smooth_field((2, 8, 128), heads=1)
    q[:, :, 256:384] = torch.randn(128, 32)
    k[:, :, 640:704] = k.mean(2, keepdim=True) + torch.randn(64, 32)
    kept, clustered = (
        reference.attention(q, k, v, thresholds=[Thresholds(0.2, 1.0, 0.3, None)], predictor=predictor).kept[0, 0]
        for predictor in ("sparge", "clusters")
    )
    assert kept[2].all() and kept[:, 10].all() and clustered[:, 10].all()
    assert not clustered[2].all()
    assert kept.float().mean() < 0.6 and clustered.float().mean() < 0.6


def test_prediction_uses_the_given_scale():
    q, k, v = smooth_field(heads=1)
    gentle, sharp = (
        reference.attention(q, k, v, thresholds=[DEFAULT], scale=scale).density.item() for scale in (0.05, 0.5)
    )
    assert sharp < gentle - 0.1


@both_precisions
@pytest.mark.parametrize("eps", [0.001, 0.1, 0.9])
def test_dropped_mass_stays_below_its_certificate(precision, eps):
    q, k, v = random_qkv(1, 1000, dim=16)
    entry = Thresholds(1.0, 1.0, -1.0, math.log(eps / 1000))
    result = reference.attention(q * 20, k, v, thresholds=[entry], precision=precision)
    assert result.pv_skipped.min() > 0
    assert result.dropped_mass.max() <= eps


def test_skipped_mass_stays_in_the_denominator():
    q, k, v = random_qkv(1, 640, heads=1)
    result = reference.attention(q, k, torch.ones_like(v), thresholds=[Thresholds(1.0, 1.0, -1.0, -0.5)])
    assert 0 < result.dropped_mass.item() < 1
    torch.testing.assert_close(result.output, (1 - result.dropped_mass)[..., None].expand_as(result.output))


def test_quantization_error_is_half_a_step_and_zeros_are_safe():
    q, k = torch.randn(1, 1, 100, 16), torch.randn(1, 1, 100, 16) + 50
    q[:, :, 3] = 0
    k[:, :, :64] = 50
    rows, tiled = quantize.quantize_rows(q), quantize.quantize_tiles(k)
    assert ((rows.codes * rows.scale[..., None] - q).abs() <= rows.scale[..., None] * 0.501).all()
    restored = tiled.codes * tiled.scale[..., None, None] + tiled.mean[..., None, :]
    error = (restored.flatten(2, 3)[:, :, :100] - k).abs()
    assert (error <= tiled.scale.repeat_interleave(K_TILE, -1)[..., :100, None] * 0.501 + 1e-5).all()
    assert tiled.scale[0, 0, 0] == 0 and rows.scale[0, 0, 3] == 0
    assert not rows.exact.any() and not tiled.exact.any()


@pytest.mark.parametrize("predictor, density", [("sparge", 0.7), ("clusters", 0.75)])
def test_default_thresholds_on_a_smooth_field_skip_a_part_within_five_percent(predictor, density):
    q, k, v = smooth_field()
    result = reference.attention(q, k, v, thresholds=[DEFAULT], predictor=predictor)
    assert result.density.max() < density
    assert relative_l1(result.output, dense(q, k, v)) < 0.05
