"""Masks in every memory order: the native kernel's bits are those of a contiguous copy."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import HALF, random_qkv
from stages import assert_same_stages, native_stages, reference_stages
from torch import Tensor

from sparge_kernels.thresholds import Thresholds

ORDERS = list(itertools.permutations(range(4)))
NAMES = ["".join("bhqk"[dim] for dim in order) for order in ORDERS]
BY_MASS = Thresholds(None, 0.9, -1.0, None)  # leaves tiles out by the mask's means, too
SIZES = {  # batch, heads, kv_heads, q_len, k_len: several bands, one, and ends of all lengths
    "bands": (2, 6, 3, 300, 200),
    "one-row": (1, 2, 1, 1, 333),
    "one-key": (2, 1, 1, 130, 1),
    "odd": (3, 1, 1, 129, 65),
    "many-heads": (1, 34, 2, 257, 70),
}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def calls(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, q_len, k_len = sizes
    return random_qkv(q_len, k_len, batch=batch, heads=heads, kv_heads=kv_heads, dtype=dtype)


def in_order(mask: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same mask, with its dimensions in memory in this order."""
    return torch.empty_permuted(mask.shape, order, dtype=mask.dtype).copy_(mask)


def tiles_of_all_kinds(batch: int, heads: int, q_len: int, k_len: int) -> Tensor:
    """Tiles that are hidden, open, nearly flat and neither, in turn; another turn for each head and batch element."""
    numbers = torch.randn(batch, heads, q_len, k_len)
    q_tile, k_tile = torch.arange(q_len)[:, None] // 128, torch.arange(k_len) // 64
    turn = torch.arange(batch)[:, None, None, None] + torch.arange(heads)[:, None, None] + q_tile + k_tile
    kinds = torch.full_like(numbers, -torch.inf), torch.zeros_like(numbers), numbers.clamp(-0.4, 0.4) - 3, numbers * 4
    return torch.stack(kinds).gather(0, (turn % 4)[None].expand(1, *numbers.shape))[0]


def assert_same_bits(actual, expected) -> None:
    for name in ("output", "kept", "density", "pv_skipped"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@every_size
@pytest.mark.parametrize("order", ORDERS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool], ids=str)
def test_a_memory_order_changes_no_bit(order, dtype, sizes):
    batch, heads, _, q_len, k_len = sizes
    tensors = calls(sizes, torch.float32 if dtype == torch.bool else dtype)
    mask = tiles_of_all_kinds(batch, heads, q_len, k_len)
    mask = mask > -1 if dtype == torch.bool else mask.to(dtype)
    expected = native_stages(*tensors, [BY_MASS], attn_mask=mask)
    torch.set_num_threads(1 + ORDERS.index(order) % 3)
    assert_same_bits(native_stages(*tensors, [BY_MASS], attn_mask=in_order(mask, order)), expected)


@every_size
@pytest.mark.parametrize("repeated", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_what_a_mask_repeats_changes_no_bit_wherever_its_keys_lie(repeated, sizes):
    batch, heads, _, q_len, k_len = sizes
    tensors = calls(sizes, torch.float32)
    whole = tiles_of_all_kinds(batch, heads, q_len, k_len)
    mask = whole[tuple(slice(1) if dim in repeated else slice(None) for dim in range(4))]
    expected = native_stages(*tensors, [BY_MASS], attn_mask=mask.contiguous())
    for one in (in_order(mask, (3, 2, 1, 0)), in_order(mask, (0, 2, 3, 1)), spread(mask)):
        assert_same_bits(native_stages(*tensors, [BY_MASS], attn_mask=one), expected)
        assert_same_bits(native_stages(*tensors, [BY_MASS], attn_mask=one.expand_as(whole)), expected)


def spread(mask: Tensor) -> Tensor:
    """Every third number of larger memory, from its second on; the others are NaN."""
    memory = mask.new_full((*mask.shape[:3], 3 * mask.shape[3] + 2), torch.nan)
    return memory[..., 1:-1:3].copy_(mask)


@every_size
def test_tiles_and_numbers_are_the_references_with_the_heads_innermost(sizes):
    batch, heads, _, q_len, k_len = sizes
    mask = in_order(tiles_of_all_kinds(batch, heads, q_len, k_len), (0, 2, 3, 1))
    for entry in (HALF, BY_MASS):
        assert_same_stages(*calls(sizes, torch.float32), [entry], attn_mask=mask)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["keys-together", "keys-apart"])
@pytest.mark.parametrize("place", [(0, 0), (15, 63), (16, 0), (17, 5), (127, 63), (100, 40)], ids=str)
@pytest.mark.parametrize("common, other", [(0.0, 2.0), (0.0, torch.nan), (-3.0, torch.inf), (-torch.inf, 1.0)])
def test_one_number_in_any_row_of_a_tile_makes_it_partial(common, other, place, order):
    mask = torch.full((1, 2, 128, 128), common)
    mask[0, 1, place[0], 64 + place[1]] = other
    call = *random_qkv(128, 128), [Thresholds(0.01, 1.0, -1.0, None)]
    kept = native_stages(*call, attn_mask=in_order(mask, order)).kept
    assert kept[0, 1, 0, 1]
    assert torch.equal(kept, reference_stages(*call, attn_mask=mask).kept)
