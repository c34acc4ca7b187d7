"""Which tiles a mask hides, cuts and leaves plain, each against a look at its numbers one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import masking_kernels, random_qkv
from mask_cases import MASKS, documents, tiles_of
from stages import assert_same_stages, native_stages, reference_stages

from sparge_kernels.masks import MASK_SPREAD, additive_mask, causal_tiles, mask_tiles
from sparge_kernels.thresholds import NEVER_SKIP, Thresholds
from workloads import smooth_field

INF, NAN = float("inf"), float("nan")
FEW = Thresholds(0.01, 1.0, -1.0, NEVER_SKIP)
LIGHT = settings(deadline=None, derandomize=True, max_examples=40)


def kind(tile):
    """hidden, plain or partial, as masks.py defines them."""
    numbers = tile.flatten().tolist()
    if all(number == -INF for number in numbers):
        return "hidden"
    finite = all(-INF < number < INF for number in numbers)
    return "plain" if finite and max(numbers) - min(numbers) <= MASK_SPREAD else "partial"


def assert_sorted(mask):
    tiles = mask_tiles(mask)
    for i, j, tile in tiles_of(mask):
        for b in range(mask.shape[0]):
            for h in range(mask.shape[1]):
                one = kind(tile[b, h])
                assert bool(tiles.hidden[b, h, i, j]) == (one == "hidden")
                assert bool(tiles.partial[b, h, i, j]) == (one == "partial")
                bias = tile[b, h].double().mean().item() if one == "plain" else 0
                assert tiles.bias[b, h, i, j].item() == pytest.approx(bias, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("q_len, k_len", [(1, 1), (130, 200), (256, 64)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_tiles_are_sorted_by_their_numbers(mask, q_len, k_len):
    assert_sorted(additive_mask(mask(2, 2, q_len, k_len), torch.float32).expand(2, 2, q_len, k_len))


@LIGHT
@given(
    q_len=st.integers(1, 300),
    k_len=st.integers(1, 300),
    common=st.sampled_from([0.0, -3.0, -1e4, -INF, INF]),
    other=st.sampled_from([0.0, -3.0, -7.9, -8.0, -8.1, 8.1, -1e9, -INF, INF, NAN]),
    place=st.integers(0, 2**20),
    precision=st.sampled_from(["int8", "none"]),
)
def test_one_number_decides_on_its_tile_alone(q_len, k_len, common, other, place, precision):
    mask = torch.full((1, 1, q_len, k_len), common)
    mask.view(-1)[place % mask.numel()] = other
    assert_sorted(mask)
    q, k, v = random_qkv(q_len, k_len)
    options = {"attn_mask": mask, "precision": precision}
    actual = native_stages(q, k, v, [FEW], **options)
    expected = reference_stages(q, k, v, [FEW], **options)
    assert torch.equal(actual.kept, expected.kept)
    assert torch.equal(actual.density, expected.density)
    assert torch.equal(actual.output.isnan(), expected.output.isnan())
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=0.03, equal_nan=True)


@pytest.mark.parametrize("q_len, k_len", [(300, 300), (70, 300), (300, 70), (129, 64)])
def test_a_causal_mask_sorts_the_tiles_as_is_causal_does(q_len, k_len):
    """But for tiles on the diagonal that every query sees whole."""
    mask = additive_mask(torch.ones(q_len, k_len, dtype=torch.bool).tril(), torch.float32)
    by_mask = mask_tiles(mask)
    by_flag = causal_tiles(q_len, k_len, True, torch.float32, mask.device)
    assert torch.equal(by_mask.hidden, by_flag.hidden)
    assert not (by_mask.partial & ~by_flag.partial).any()


@masking_kernels
def test_hidden_tiles_do_not_count_and_cut_ones_are_always_kept(kernel):
    q, k, v = random_qkv(256, 640, heads=1)
    mask = torch.ones(1, 1, 256, 640, dtype=torch.bool)
    mask[:, :, :128, 320:] = False  # of 20 tiles 5 are hidden
    mask[:, :, 130, 100] = False  # and one is cut
    density = kernel(q, k, v, [FEW], attn_mask=mask).density
    assert density.item() == pytest.approx((1 + 1 + 1) / 15)


def test_the_mean_of_the_mask_takes_part_in_the_prediction():
    q, k, v = smooth_field((1, 4, 128), heads=1)
    far = torch.arange(512)[None, None, None, :] // 64  # of every tile of keys
    for wanted in (0, 3, 7):
        mask = -4.0 * (far - wanted).abs()
        kept = assert_same_stages(q, k, v, [Thresholds(0.1, 1.0, -1.0, NEVER_SKIP)], attn_mask=mask).kept
        assert kept[..., wanted].all() and kept.sum() == kept.shape[2]


@pytest.mark.parametrize("similarity", [-1.0, 0.3, 0.5])
@pytest.mark.parametrize("mask", ["documents", "sliding-window", "causal", "alibi", "bias-of-keys", "steep-bias"])
def test_smooth_fields_under_masks_have_the_references_tiles(mask, similarity):
    q, k, v = smooth_field((1, 7, 128), heads=2)
    attn_mask = MASKS[mask](1, 2, 896, 896)
    for entry in (Thresholds(0.1, 1.0, similarity, -4.0), Thresholds(None, 0.9, similarity, None)):
        assert_same_stages(q, k, v, [entry], attn_mask=attn_mask)


def test_documents_are_as_good_as_separate_calls():
    q, k, v = random_qkv(600, 600)
    together = native_stages(q, k, v, [Thresholds(0.1, 1.0, -1.0, None)], attn_mask=documents(1, 1, 600, 600)).output
    for start, end in ((0, 50), (50, 120), (120, 210), (210, 320)):
        own = (slice(None), slice(None), slice(start, end))
        alone = native_stages(q[own], k[own], v[own], [Thresholds(1.0, 1.0, -1.0, None)], precision="none").output
        assert (together[own] - alone).abs().sum() < 0.01 * alone.abs().sum()


@pytest.mark.parametrize("number", [1e35, -1e35, -1e38, torch.finfo(torch.float32).min], ids=str)
def test_the_mean_of_large_numbers_does_not_overflow(number):
    assert_sorted(torch.full((1, 1, 130, 200), number))
