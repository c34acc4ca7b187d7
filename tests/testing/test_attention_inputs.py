"""`AttentionInputs` and the strategy that draws them: what they promise, and what they refuse."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import sparge_compile.testing as testing
from sparge_compile.testing import LAYOUTS, MASKS, NON_FINITE, VALUES, AttentionInputs, attention_inputs

LIGHT = settings(deadline=None, derandomize=True, max_examples=60, database=None)


@LIGHT
@given(attention_inputs(non_finite=True, max_tokens=70))
def test_shapes_dtypes_and_arguments_are_those_described(inputs):
    query, key, value = inputs.tensors
    assert query.shape == (inputs.batch, inputs.q_heads, inputs.q_len, inputs.head_dim)
    assert key.shape == (inputs.batch, inputs.kv_heads, inputs.k_len, inputs.head_dim)
    assert value.shape == (*key.shape[:3], inputs.value_head_dim)
    assert query.dtype == key.dtype == value.dtype == inputs.dtype
    mask = inputs.attn_mask
    if mask is not None:
        assert mask.dtype in (torch.bool, inputs.dtype) and not inputs.is_causal
        assert mask.dtype == (inputs.dtype if inputs.mask.startswith("float") else torch.bool)
        assert torch.broadcast_shapes(mask.shape, (*query.shape[:3], inputs.k_len)) == (*query.shape[:3], inputs.k_len)
    assert inputs.call(lambda *tensors, **kwargs: (tensors, kwargs)) == (inputs.tensors, inputs.kwargs)


@LIGHT
@given(attention_inputs(non_finite=True, max_tokens=70))
def test_the_repr_makes_the_same_tensors_again(inputs):
    again = eval(repr(inputs), {"AttentionInputs": AttentionInputs, "torch": torch})
    assert again == inputs and repr(again) == repr(inputs)
    for one, other in zip((*inputs.tensors, inputs.attn_mask), (*again.tensors, again.attn_mask), strict=True):
        if one is not None:
            assert one.stride() == other.stride() and one.storage_offset() == other.storage_offset()
            assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def test_the_text_has_shapes_and_strides():
    inputs = AttentionInputs(5, 7, mask="padding-expanded", layouts=("sliced", "contiguous", "one-head-expanded"))
    text = str(inputs)
    assert text.startswith(repr(inputs)) and "query [1, 1, 5, 16] float32, strides [144, 144, 18, 1]" in text
    assert "attn_mask [1, 1, 5, 7] bool, strides [7, 7, 0, 1]" in text


@LIGHT
@given(attention_inputs(dtypes=(torch.float32,), max_tokens=70))
def test_dense_is_what_sdpa_gives(inputs):
    torch.testing.assert_close(
        inputs.call(F.scaled_dot_product_attention),
        inputs.dense(torch.float32),
        rtol=1e-3,
        atol=1e-4 * float(inputs.value.abs().max()),
    )
    assert inputs.dense().dtype == torch.float64
    assert (inputs.magnitude() + 1e-9 >= inputs.dense().abs()).all()


def found(count=100, **restrictions):
    """The calls drawn under these restrictions."""
    kinds = set()

    @settings(LIGHT, max_examples=count, phases=[Phase.generate])
    @given(attention_inputs(**restrictions))
    def collect(inputs):
        kinds.add(inputs)

    collect()
    return kinds


def test_every_kind_of_call_is_drawn():
    drawn = found(2000, non_finite=True)
    assert {x.mask for x in drawn} == {None, *MASKS}
    assert {layout for x in drawn for layout in x.layouts} == set(LAYOUTS)
    assert {x.values for x in drawn} == {*VALUES, *NON_FINITE}
    assert {x.dtype for x in drawn} == {torch.float32, torch.bfloat16, torch.float16}
    assert {x.is_causal for x in drawn} == {True, False}
    assert {x.q_heads // x.kv_heads for x in drawn} >= {1, 2, 3, 4, 7}
    assert any(x.scale == 0 for x in drawn) and any((x.scale or 0) < 0 for x in drawn)
    assert {1, 63, 64, 65, 127, 128, 129, 255, 256, 257} <= {x.q_len for x in drawn} & {x.k_len for x in drawn}
    assert any(x.q_len > x.k_len for x in drawn) and any(x.q_len < x.k_len for x in drawn)


def test_restrictions_hold():
    drawn = found(
        dtypes=[torch.bfloat16],
        max_tokens=40,
        max_head_dim=64,
        max_heads=3,
        max_batch=1,
        masks=["padding", None],
        layouts=["tokens-first"],
        values=["smooth"],
        scales=False,
        self_attention=True,
    )
    assert {x.dtype for x in drawn} == {torch.bfloat16} and {x.scale for x in drawn} == {None}
    assert {x.mask for x in drawn} == {None, "padding"} and {x.values for x in drawn} == {"smooth"}
    assert {x.layouts for x in drawn} == {("tokens-first",) * 3}
    assert max(x.q_len for x in drawn) <= 40 and all(x.q_len == x.k_len for x in drawn)
    assert max(max(x.head_dim, x.value_head_dim) for x in drawn) <= 64
    assert max(x.q_heads for x in drawn) == 3 and {x.batch for x in drawn} == {1}
    assert {x.is_causal for x in found(causal=True)} == {True}
    assert {x.is_causal for x in found(causal=False)} == {False}
    assert not {x.values for x in found()} & NON_FINITE.keys()


@pytest.mark.parametrize("most", [1, 2, 5, 6, 9])
def test_every_number_of_heads_up_to_the_largest_is_drawn_in_groups_and_alone(most):
    drawn = {(x.q_heads, x.kv_heads) for x in found(400, max_heads=most, max_tokens=2)}
    assert {q_heads for q_heads, _ in drawn} == set(range(1, most + 1))
    assert {(most, 1), (most, most)} <= drawn


def test_causal_calls_have_positive_scales_and_others_any():
    assert {(x.scale or 1) > 0 and x.scale != 0 for x in found(200, causal=True)} == {True}
    drawn = {x.scale for x in found(200, causal=False, max_head_dim=1)}
    assert {None, 0.0, -0.5, 0.3, 1.5} == drawn


def test_failures_shrink_to_small_calls():
    smallest = find(attention_inputs(), lambda x: x.k_len >= 64 and x.mask is not None, settings=LIGHT)
    assert (smallest.q_len, smallest.k_len, smallest.q_heads, smallest.batch) == (1, 64, 1, 1)
    assert (smallest.dtype, smallest.layouts, smallest.values) == (torch.float32, ("contiguous",) * 3, "normal")


REFUSED = {
    "a-mask-not-known": (lambda: attention_inputs(masks=["diagonal"]), "masks='diagonal': known are None, bool-2d"),
    "a-layout-not-known": (lambda: attention_inputs(layouts=["odd"]), "layouts='odd': known are contiguous"),
    "values-not-asked-for": (lambda: attention_inputs(values=["nans"]), "values='nans'"),
    "nothing-to-draw-from": (lambda: attention_inputs(dtypes=[]), "dtypes is empty"),
    "no-tokens": (lambda: attention_inputs(max_tokens=0), "max_tokens=0: must be 1 or more"),
    "heads": (lambda: AttentionInputs(4, 4, q_heads=3, kv_heads=2), "multiple of kv_heads=2"),
    "two-masks": (lambda: AttentionInputs(4, 4, is_causal=True, mask="padding"), "give one"),
    "a-wrong-name": (lambda: AttentionInputs(4, 4, values="large"), "values='large': known are normal"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_known_is_refused_with_what_is(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_hypothesis_the_error_names_the_extra_and_the_rest_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"pip install 'sparge-compile\[testing\]'"):
        attention_inputs()
    testing.assert_close_to_dense(F.scaled_dot_product_attention, AttentionInputs(5, 7))


def test_it_is_a_strategy():
    assert isinstance(attention_inputs(), st.SearchStrategy)
