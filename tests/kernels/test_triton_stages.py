"""The GPU kernels' means, centres, INT8 codes, flags, self-similarities and masks are those of the torch functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, both_causal, random_qkv
from mask_cases import MASKS
from torch import Tensor
from triton_cases import DEVICE, on_device, poisoned_memory

from sparge_kernels import masks, predict, quantize
from sparge_kernels.thresholds import K_TILE, Q_TILE
from sparge_kernels.tiles import split_tiles
from sparge_kernels.triton.keys import KeyTiles, prepare_keys
from sparge_kernels.triton.mask import classify_mask
from sparge_kernels.triton.queries import QueryTiles, prepare_queries

assert poisoned_memory
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy in the interpreter, at inf and NaN
]
LIGHT = settings(
    deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
INF, NAN = float("inf"), float("nan")
CLOSE = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
TIE = 1e-3  # a quotient this near to a half may round either way
NOT_INT8, NON_FINITE_V, NON_FINITE_K = 1, 2, 4
LENGTHS = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 191, 200, 256, 257])
DIMS = st.sampled_from([1, 3, 16, 31, 32, 33, 40, 64, 72, 96, 128, 255, 256])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def assert_codes(codes: Tensor, expected: Tensor, x: Tensor, scale: Tensor) -> None:
    """The expected codes [..., S, D]; one off where x / scale (in fp64) is as good as a tie."""
    quotients = x.double() / scale.double().masked_fill(scale == 0, INF)[..., None]
    tie = ((quotients - quotients.floor()) - 0.5).abs() < TIE
    assert ((codes.int() - expected.int()).abs() <= tie).all()


def per_key(x: Tensor, k_len: int) -> Tensor:
    return x.repeat_interleave(K_TILE, -1)[..., :k_len]


def assert_keys(k: Tensor, v: Tensor, is_causal: bool, centring_is_rounding: bool = False) -> KeyTiles:
    """All that prepare_keys gives, against predict.py and quantize.py."""
    actual = prepare_keys(on_device(k), on_device(v), is_causal=is_causal, quantized=True)
    k, k_len, dim = k.float(), k.shape[2], k.shape[3]
    means, centre = predict.tile_means(k, K_TILE), quantize.shared_centre(k, is_causal)
    torch.testing.assert_close(actual.means[..., :dim].cpu(), means, **CLOSE)
    torch.testing.assert_close(actual.centre[..., :dim].cpu(), centre, **CLOSE)
    assert not actual.means[..., dim:].any() and not actual.centre[..., dim:].any()
    k_bad = ~(predict.finite_tiles(k, K_TILE) & means.isfinite().all(-1))
    v_bad = ~predict.finite_tiles(v, K_TILE)
    assert torch.equal((actual.flags & NON_FINITE_K).cpu() != 0, k_bad)
    assert torch.equal((actual.flags & NON_FINITE_V).cpu() != 0, v_bad)
    if centring_is_rounding:
        return actual
    similarity = predict.self_similarity(k, K_TILE, predict.key_centres(means, k_len, is_causal))
    torch.testing.assert_close(actual.similarity.cpu(), similarity.masked_fill(k_bad | v_bad, NAN), **CLOSE)
    tiles = quantize.quantize_tiles(k, actual.centre[..., :dim].cpu())
    exact = tiles.exact | k_bad
    assert torch.equal((actual.flags & NOT_INT8).cpu() != 0, exact)
    torch.testing.assert_close(actual.scale.cpu(), tiles.scale.masked_fill(exact, 0), rtol=1e-6, atol=0)
    codes, expected = actual.codes.flatten(2, 3).cpu(), tiles.codes.masked_fill(exact[..., None, None], 0)
    centred = k - actual.centre[..., None, :dim].cpu()
    scale = per_key(tiles.scale.masked_fill(exact, 0), k_len)
    assert_codes(codes[:, :, :k_len, :dim], expected.flatten(2, 3)[:, :, :k_len], centred, scale)
    assert not codes[:, :, k_len:].any() and not codes[..., dim:].any()
    return actual


def assert_queries(q: Tensor, centre: Tensor, group: int, sign: int) -> QueryTiles:
    """All that prepare_queries gives; centre [B, Hkv, D]."""
    q_len, dim = q.shape[2:]
    padded = max(32, 1 << (dim - 1).bit_length())
    padded_centre = torch.nn.functional.pad(centre, (0, padded - dim)).to(DEVICE)
    actual = prepare_queries(on_device(q), padded_centre, group, sign=sign)
    q = q.float()
    means, similarity = predict.tile_means(q, Q_TILE), predict.self_similarity(q, Q_TILE)
    torch.testing.assert_close(actual.means[..., :dim].cpu(), means, **CLOSE)
    assert not actual.means[..., dim:].any()
    expected = similarity.masked_fill(~means.isfinite().all(-1), NAN)
    torch.testing.assert_close(actual.similarity.cpu(), expected, **CLOSE)
    rows = quantize.quantize_rows(q)
    scale, codes = actual.scale.cpu(), actual.codes.flatten(2, 3).cpu()
    torch.testing.assert_close(scale[..., :q_len], rows.scale.masked_fill(rows.exact, NAN), **CLOSE | {"atol": 0})
    assert not scale[..., q_len:].any() and not codes[:, :, q_len:].any() and not codes[..., dim:].any()
    assert_codes(sign * codes[:, :, :q_len, :dim], rows.codes, q, rows.scale)
    tile_exact = split_tiles(rows.exact[..., None], Q_TILE).any(-2)[..., 0]
    assert torch.equal(actual.exact.cpu() != 0, tile_exact)
    products = q * centre.repeat_interleave(group, 1)[:, :, None]
    size = products.abs().sum(-1)  # where it overflows, the order of the sum decides
    difference = (actual.offset[..., :q_len].cpu() - products.sum(-1)).abs()
    assert ((difference <= 1e-6 * size) | ~(size < INF)).all()
    return actual


@LIGHT
@given(
    k_len=LENGTHS, dim=DIMS, value_dim=DIMS, dtype=DTYPES, batch=st.integers(1, 2), heads=st.integers(1, 3),
    layout=st.sampled_from(sorted(LAYOUTS)), offset=st.sampled_from([0.0, 3.0]), is_causal=st.booleans(),
)  # fmt: skip
def test_keys_of_any_size_type_and_layout(k_len, dim, value_dim, dtype, batch, heads, layout, offset, is_causal):
    _, k, v = random_qkv(1, k_len, heads=heads, batch=batch, dim=dim, value_dim=value_dim, dtype=dtype)
    k, v = (LAYOUTS[layout](x + offset) for x in (k, v))
    assert_keys(k, v, is_causal, centring_is_rounding=layout == "one-token-expanded")


@LIGHT
@given(
    q_len=LENGTHS, dim=DIMS, dtype=DTYPES, batch=st.integers(1, 2), heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    layout=st.sampled_from(sorted(LAYOUTS)), offset=st.sampled_from([0.0, 3.0]), sign=st.sampled_from([1, -1]),
)  # fmt: skip
def test_queries_of_any_size_type_and_layout(q_len, dim, dtype, batch, heads, layout, offset, sign):
    q, k, _ = random_qkv(q_len, 7, heads=heads[0], kv_heads=heads[1], batch=batch, dim=dim, dtype=dtype)
    assert_queries(LAYOUTS[layout](q + offset), k.float().mean(2), heads[0] // heads[1], sign)


# Numbers put into Q, K or V of 170 tokens and 16 channels: which tensor, rows, channels, what becomes of them.
SPOILS = {
    "outlier": ("k", slice(70, 71), slice(3, 4), lambda x: 0 * x + 100),
    "outlier-just-allowed": ("k", slice(70, 71), slice(None), lambda x: 3 * x),
    "tile-far-from-the-others": ("k", slice(64, 128), slice(None), lambda x: x + 60),
    "infinite-key": ("k", slice(10, 11), slice(2, 3), lambda x: x - INF),
    "nan-key": ("k", slice(10, 11), slice(2, 3), lambda x: x * NAN),
    "nan-value": ("v", slice(130, 131), slice(1, 2), lambda x: x * NAN),
    "infinite-last-value": ("v", slice(-1, None), slice(-1, None), lambda x: x + INF),
    "sum-of-keys-overflows": ("k", slice(64, 128), slice(None), lambda x: 0 * x + 2e38),
    "all-sums-of-keys-overflow": ("k", slice(None), slice(None), lambda x: 0 * x + 2e38),
    "sum-of-tiles-overflows": ("k", slice(None), slice(None), lambda x: 3e36 + 1e35 * x),
    "subnormal-scale-of-keys": ("k", slice(64, 128), slice(None), lambda x: x * 1e-37),
    "denormal-keys": ("k", slice(None), slice(None), lambda x: x * 1e-41),
    "zero-keys": ("k", slice(64, 128), slice(None), lambda x: 0 * x),
    "all-keys-zero": ("k", slice(None), slice(None), lambda x: 0 * x),
    "squares-of-keys-overflow": ("k", slice(None), slice(None), lambda x: x * 1e25),
    "squares-of-keys-underflow": ("k", slice(None), slice(None), lambda x: x * 1e-25),
    "nan-query": ("q", slice(3, 4), slice(1, 2), lambda x: x * NAN),
    "infinite-query": ("q", slice(130, 131), slice(15, 16), lambda x: x - INF),
    "sum-of-queries-overflows": ("q", slice(128, 170), slice(None), lambda x: 0 * x + 3e38),
    "subnormal-scale-of-a-query": ("q", slice(3, 4), slice(None), lambda x: x * 1e-37),
    "denormal-query": ("q", slice(3, 4), slice(None), lambda x: 0 * x + 1e-45),
    "zero-queries": ("q", slice(3, 9), slice(None), lambda x: 0 * x),
    "squares-of-queries-overflow": ("q", slice(None), slice(None), lambda x: x * 1e25),
    "squares-of-queries-underflow": ("q", slice(None), slice(None), lambda x: x * 1e-25),
}


@both_causal
@pytest.mark.parametrize("name", SPOILS)
def test_what_int8_cannot_hold_is_flagged_and_spoils_no_other(name, is_causal):
    which, rows, channels, change = SPOILS[name]
    tensors = dict(zip("qkv", random_qkv(170, 170, heads=2, kv_heads=1), strict=True))
    place = tensors[which][:, :, rows, channels]
    place.copy_(change(place))
    if which == "q":
        assert_queries(tensors["q"], torch.linspace(-1, 1, 16).expand(1, 1, 16), 2, 1)
    else:
        assert_keys(tensors["k"], tensors["v"], is_causal)


@both_causal
def test_centres_of_more_tiles_than_fit_at_once(is_causal):
    _, k, v = random_qkv(1, 131 * K_TILE - 5, heads=1, dim=8, value_dim=1)
    k += torch.linspace(0, 1, k.shape[2])[:, None]
    assert_keys(k, v, is_causal)


def test_no_number_of_a_tile_depends_on_a_later_key():
    _, k, v = random_qkv(1, 300, dim=40)
    before = prepare_keys(on_device(k), on_device(v), is_causal=True, quantized=True, clustered=True)
    k[:, :, 128:], v[:, :, 200:] = INF, NAN
    after = prepare_keys(on_device(k), on_device(v), is_causal=True, quantized=True, clustered=True)
    for name in ("codes", "scale", "means", "similarity", "flags"):
        assert torch.equal(getattr(after, name)[:, :, :2], getattr(before, name)[:, :, :2]), name
    assert torch.equal(after.centre, before.centre)
    for name in ("codes", "numbers"):
        after_name, before_name = (getattr(x.clusters, name).unflatten(-1, (-1, 1)) for x in (after, before))
        tiles = -3 if name == "codes" else -2
        assert torch.equal(after_name.narrow(tiles, 0, 2), before_name.narrow(tiles, 0, 2)), name


@both_causal
def test_without_quantization_there_are_only_means_similarities_and_what_is_not_finite(is_causal):
    q, k, v = random_qkv(140, 200)
    k[0, 0, 70, 0], v[0, 1, 0, 0], k[0, 0, 130, 0] = INF, NAN, 1e4
    keys = prepare_keys(on_device(k), on_device(v), is_causal=is_causal, quantized=False)
    quantized = prepare_keys(on_device(k), on_device(v), is_causal=is_causal, quantized=True)
    assert keys.codes is keys.scale is keys.centre is None
    assert keys.flags[0].tolist() == [[0, NON_FINITE_K, 0, 0], [NON_FINITE_V, 0, 0, 0]]
    torch.testing.assert_close(keys.similarity, quantized.similarity, rtol=0, atol=0, equal_nan=True)
    queries, full = (prepare_queries(on_device(q), x, 1, sign=1) for x in (None, quantized.centre))
    assert queries.codes is queries.scale is queries.offset is queries.exact is None
    assert torch.equal(queries.similarity, full.similarity) and torch.equal(queries.means, full.means)


def assert_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Kinds and biases of a mask that broadcasts to `shape`, against masks.mask_tiles."""
    tiles = classify_mask(on_device(mask), *shape[2:])
    expected = masks.mask_tiles(masks.additive_mask(mask, torch.float32).expand(shape))
    kind, bias = (x.cpu().expand_as(expected.bias) for x in (tiles.kind, tiles.bias))
    plain = ~expected.hidden & ~expected.partial & ~expected.biased
    wanted = 3 * expected.partial.int() + 2 * expected.biased.int() + plain.int()
    assert torch.equal(kind.int(), wanted)
    torch.testing.assert_close(bias, expected.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("q_len, k_len", [(1, 1), (130, 200), (256, 64)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_kind_and_shape(name, q_len, k_len):
    mask = MASKS[name](2, 2, q_len, k_len)
    assert_mask(mask, (2, 2, q_len, k_len))
    if mask.is_floating_point():
        assert_mask(mask.bfloat16(), (2, 2, q_len, k_len))


@LIGHT
@given(
    q_len=st.integers(1, 300),
    k_len=st.integers(1, 300),
    common=st.sampled_from([0.0, -0.0, -3.0, -1e4, -INF, INF, 3.4e38, -3.4e38]),
    other=st.sampled_from([0.0, -3.0, -7.9, -8.0, -8.1, 8.1, -1e9, -INF, INF, NAN]),
    place=st.integers(0, 2**20),
)
@example(q_len=130, k_len=70, common=0.0, other=-8.0, place=9000)
def test_one_number_decides_on_its_tile_of_the_mask_alone(q_len, k_len, common, other, place):
    mask = torch.full((1, 1, q_len, k_len), common)
    mask.view(-1)[place % mask.numel()] = other
    assert_mask(mask, tuple(mask.shape))
