"""`assert_close_to_dense` passes what is right, and says of every way to be wrong what it is and where."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparge_compile as sparge
from sparge_compile import Policy
from sparge_compile.testing import AttentionInputs, assert_close_to_dense
from sparge_compile.testing.visible import dense_over_visible_keys

SDPA = F.scaled_dot_product_attention
INPUTS = AttentionInputs(130, 70, batch=2, q_heads=4, kv_heads=2, seed=3)
CAUSAL = AttentionInputs(130, 130, is_causal=True, q_heads=2, kv_heads=2)
MASKED = AttentionInputs(130, 70, mask="bool-4d")
SLICED = AttentionInputs(130, 70, layouts=("sliced", "contiguous", "contiguous"))
INFINITE = AttentionInputs(130, 70, values="infinities")
SPARSE = Policy(min_tokens=0, topk=1.0)


@pytest.mark.parametrize("inputs", [INPUTS, CAUSAL, MASKED], ids=["gqa", "causal", "masked"])
def test_what_is_right_passes(inputs):
    assert_close_to_dense(sparge.attention, inputs)
    assert_close_to_dense(SDPA, inputs, max_error=1e-5, max_row_error=1e-4, check_strides=True)


def spoiled(change):
    """Dense attention whose output is changed."""

    def attention(q, k, v, **kwargs):
        return change(SDPA(q, k, v, **kwargs))

    return attention


def row_of_zeros(x):
    x[1, 2, 129] = 0
    return x


def one_nan(x):
    x[0, 1, 5, 3] = torch.nan
    return x


def writes(q, k, v, **kwargs):
    k[0, 0, 0, 0] += 1
    return SDPA(q, k, v, **kwargs)


def writes_into_query(q, k, v, **kwargs):
    return q.copy_(SDPA(q, k, v, **kwargs))


def writes_infinity(q, k, v, **kwargs):
    output = SDPA(q, k, v, **kwargs)
    v.clamp_(min=torch.finfo(v.dtype).min)
    return output


def writes_between(q, k, v, **kwargs):
    torch.as_strided(q, (q.untyped_storage().nbytes() // 4,), (1,), 0)[0] = 7.0
    return SDPA(q, k, v, **kwargs)


def keeps_the_storage(q, k, v, **kwargs):
    return v


WRONG = {
    "an-unwritten-row": (
        spoiled(row_of_zeros),
        INPUTS,
        r"1 of 1040 rows.*worst, batch 1, head 2, query 129.*cosine 0;",
    ),
    "everything-twice": (spoiled(lambda x: 2 * x), INPUTS, r"the error is .*max_error=0\.02"),
    "nan": (spoiled(one_nan), INPUTS, r"1 numbers are NaN, 0 in dense; 1 rows differ, the first is batch 0, head 1, q"),
    "dtype": (spoiled(lambda x: x.double()), INPUTS, r"the output is torch.float64, dense gives torch.float32"),
    "shape": (spoiled(lambda x: x[:, :, :5]), INPUTS, r"shape is \[2, 4, 5, 16\], that of dense is \[2, 4, 130, 16\]"),
    "no-tensor": (spoiled(lambda x: (x,)), INPUTS, "the output is tuple, not a tensor"),
    "an-input-written": (writes, INPUTS, "the call wrote to its key"),
    "into-the-query": (writes_into_query, INPUTS, "the call wrote to its query"),
    "infinity-written": (writes_infinity, INFINITE, "the call wrote to its value"),
    "memory-between-written": (writes_between, SLICED, "the call wrote to the memory around its query"),
    "an-input-returned": (keeps_the_storage, CAUSAL, "the output is memory of the value"),
    "mask-dropped": (lambda q, k, v, attn_mask, **rest: SDPA(q, k, v, **rest), MASKED, r"rows are too far off"),
    "causal-dropped": (lambda q, k, v, is_causal, **rest: SDPA(q, k, v, **rest), CAUSAL, r"rows are too far off"),
}


@pytest.mark.parametrize(("attention", "inputs", "message"), WRONG.values(), ids=WRONG.keys())
def test_every_way_to_be_wrong_is_named_and_the_inputs_can_be_made_again(attention, inputs, message):
    inputs = eval(repr(inputs))  # a fresh one: some of these write to it
    with pytest.raises(AssertionError, match=message) as error:
        assert_close_to_dense(attention, inputs)
    assert repr(inputs) in str(error.value) and "query [" in str(error.value)


def test_strides_are_compared_when_asked():
    strided = spoiled(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    assert_close_to_dense(strided, CAUSAL)
    with pytest.raises(AssertionError, match=r"strides are \[\d.*those of dense"):
        assert_close_to_dense(strided, CAUSAL, check_strides=True)


def test_a_hidden_nan_may_spoil_a_row_or_not_and_a_seen_one_must():
    inputs = AttentionInputs(130, 130, is_causal=True, values="nans")
    assert inputs.dense()[0, 0, 0].isnan().any()  # plain math multiplies the hidden number by 0
    assert_close_to_dense(SDPA, inputs)
    assert_close_to_dense(sparge.attention, inputs)
    with pytest.raises(AssertionError, match="numbers are NaN"):
        assert_close_to_dense(spoiled(lambda x: x.nan_to_num(0.0)), inputs)


HIDING_NAN = {
    "causal": AttentionInputs(130, 130, is_causal=True, values="nans"),
    "mask": AttentionInputs(70, 130, mask="window", values="nans"),
    "float-mask": AttentionInputs(70, 130, mask="float-some-see-nothing", values="nans", q_heads=2),
    "infinity": AttentionInputs(130, 130, is_causal=True, values="infinities"),
}


@pytest.mark.parametrize("inputs", HIDING_NAN.values(), ids=HIDING_NAN.keys())
def test_where_dense_spoils_a_row_needlessly_the_visible_keys_decide(inputs):
    dense, visible = inputs.dense(), dense_over_visible_keys(inputs, inputs.value)
    spoiled = dense.isnan() & ~visible.isnan()
    assert spoiled.any()
    for number in (torch.nan, None):
        right = torch.where(spoiled, visible if number is None else number, dense).to(inputs.dtype)
        assert_close_to_dense(lambda *_, right=right, **__: right, inputs)
    for number in (12345.0, 0.0):
        wrong = torch.where(spoiled, number, dense).to(inputs.dtype)
        with pytest.raises(AssertionError, match="rows are too far off"):
            assert_close_to_dense(lambda *_, wrong=wrong, **__: wrong, inputs)


@pytest.mark.parametrize("values", ["normal", "nans", "infinities"])
@pytest.mark.parametrize("mask", [None, "bool-4d", "some-see-nothing", "float-some-see-nothing"])
def test_dense_over_visible_keys_is_dense_of_each_row_alone(mask, values):
    inputs = AttentionInputs(
        33, 40, batch=2, q_heads=4, kv_heads=2, mask=mask, is_causal=mask is None, values=values, scale=0.3
    )
    actual = dense_over_visible_keys(inputs, inputs.value)
    bias = torch.zeros(33, 40) if mask is None else inputs.attn_mask
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape).masked_fill(~bias, -torch.inf)
    if mask is None:
        bias = bias.masked_fill(~torch.ones(33, 40, dtype=torch.bool).tril(), -torch.inf)
    bias = bias.double().expand(2, 4, 33, 40)
    for batch, head, row in itertools.product(range(2), range(4), range(33)):
        seen = bias[batch, head, row] > -torch.inf
        expected = torch.zeros(16, dtype=torch.float64)
        if seen.any():
            q, k, v = inputs.query[batch, head, row], inputs.key[batch, head // 2], inputs.value[batch, head // 2]
            scores = bias[batch, head, row, seen][None, None]
            expected = SDPA(q.double()[None, None], k[seen].double()[None], v[seen].double()[None], scores, scale=0.3)
        torch.testing.assert_close(actual[batch, head, row], expected.flatten(), equal_nan=True)


def drops_the_mask(q, k, v, attn_mask, **rest):
    return SDPA(q, k, v, **rest)


def reads_half_of_the_keys(q, k, v, **kwargs):
    return SDPA(q, k[:, :, ::2], v[:, :, ::2], scale=kwargs["scale"])


LONG_AND_WRONG = {
    "an-unwritten-row": (spoiled(lambda x: x.index_fill(2, torch.tensor([77]), 0.0)), None, 8192),
    "mask-dropped": (drops_the_mask, "bool-2d", 16384),
    "half-of-the-keys": (reads_half_of_the_keys, None, 16384),
    "somewhat-large": (spoiled(lambda x: 1.25 * x), None, 8192),
}


@pytest.mark.parametrize(("attention", "mask", "k_len"), LONG_AND_WRONG.values(), ids=LONG_AND_WRONG.keys())
def test_outputs_of_many_keys_are_small_and_still_compared(attention, mask, k_len):
    inputs = AttentionInputs(128, k_len, mask=mask, scale=0.05)
    with pytest.raises(AssertionError, match="rows are too far off"):
        assert_close_to_dense(attention, inputs)
    assert_close_to_dense(lambda *args, **kwargs: sparge.attention(*args, **kwargs, topk=1.0), inputs)


def test_of_integers_a_share_may_differ():
    class Token(nn.Module):
        def forward(self, x):
            out = SDPA(x, x, x)
            return out.argmax(-1) + (torch.arange(150) < 9) * torch.compiler.is_compiling()

    inputs = 3 * torch.randn(1, 1, 150, 16, generator=torch.Generator().manual_seed(0))
    assert_close_to_dense(Token(), inputs, policy=SPARSE, max_error=0.1)
    with pytest.raises(AssertionError, match=r"\d+ of 150 numbers differ from dense \(allowed: max_error=0.05\)"):
        assert_close_to_dense(Token(), inputs, policy=SPARSE)


def test_another_reference_and_bounds_are_used():
    def half(q, k, v, **kwargs):
        return SDPA(q, k, v, **kwargs) / 2

    assert_close_to_dense(half, INPUTS, reference=half, max_error=1e-6)
    with pytest.raises(AssertionError, match="max_error=1e-06"):
        assert_close_to_dense(sparge.attention, INPUTS, max_error=1e-6)
    with pytest.raises(TypeError, match="policy= is for models"):
        assert_close_to_dense(sparge.attention, INPUTS, policy=SPARSE)


class Block(nn.Module):
    """Attention of two heads over x [B, S, 32]; `change` is done to what it gives when it is compiled."""

    def __init__(self, change=None):
        super().__init__()
        self.qkv, self.change = nn.Linear(32, 96), change

    def forward(self, x, scale=1.0):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        out = SDPA(q, k, v, is_causal=True).transpose(1, 2).flatten(2) * scale
        if self.change is not None and torch.compiler.is_compiling():
            out = self.change(out, x)
        return {"hidden": out, "all": (out.argmax(-1), None)}


X = torch.randn(2, 150, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def shown(out, x):
    return torch.where(torch.arange(150)[:, None] == 77, 0.0, out)


def written(out, x):
    x[0, 0, 0] = 5.0
    return out


MODEL_WRONG = {
    "a-row-of-zeros": (shown, r"output\['hidden'\] \[2, 150, 32\]: .*worst, row \[\d, 77\].*\n.*sparge.calibrate"),
    "an-argument-written": (written, r"argument\[0\]\[0\]: the compiled model writes to it"),
    "dtype": (lambda out, x: out.bfloat16(), r"output\['hidden'\]: dtype is torch.bfloat16, dense: torch.float32"),
    "strides": (lambda out, x: out.mT.contiguous().mT, r"output\['hidden'\]: strides are \[4800, 1, 150\]"),
}


def test_a_model_is_compiled_and_compared():
    torch.manual_seed(0)
    model = Block().eval()
    exact = Policy(min_tokens=0, precision="none", topk=1.0, pv_threshold=-1e30)
    assert_close_to_dense(model, X, policy=exact, max_error=1e-4)
    assert_close_to_dense(model, X, scale=2.0, policy=SPARSE, reference=lambda x, scale: Block.forward(model, x, 2.0))


@pytest.mark.parametrize(("change", "message"), MODEL_WRONG.values(), ids=MODEL_WRONG.keys())
def test_a_model_that_is_wrong_when_compiled_is_caught(change, message):
    torch.manual_seed(0)
    before = X.clone()
    with pytest.raises(AssertionError, match=message):
        assert_close_to_dense(Block(change).eval(), X, policy=SPARSE)
    assert torch.equal(X, before)


def test_sparse_beyond_the_bound_is_caught():
    torch.manual_seed(0)
    model = Block().eval()
    with pytest.raises(AssertionError, match=r"max_error=0\.001"):
        assert_close_to_dense(model, 4 * X, policy=Policy(min_tokens=0), max_error=1e-3)


def test_dense_compared_with_dense_is_an_error_with_the_reasons():
    with pytest.raises(AssertionError, match=r"no attention call ran sparsely[^$]*min_tokens is \d+"):
        assert_close_to_dense(Block().eval(), X)


def compiled_in_place(**options):
    model = Block().eval()
    model.compile(backend="sparge", **options)
    return model


SHORT = {"options": {"sparge.min_tokens": 0, "sparge.topk": 1.0}}
COMPILED = {
    "compiled": lambda **options: torch.compile(Block().eval(), backend="sparge", **options),
    "in-place": compiled_in_place,
    "its-blocks": lambda **options: nn.Sequential(compiled_in_place(**options)),
}


@pytest.mark.parametrize("model", COMPILED.values(), ids=COMPILED.keys())
def test_compiled_models_are_tested_as_they_were_compiled(model):
    torch.manual_seed(0)
    assert_close_to_dense(model(**SHORT), X)
    with pytest.raises(AssertionError, match="max_error=1e-07"):  # the reference is dense
        assert_close_to_dense(model(**SHORT), X, max_error=1e-7)
    assert_close_to_dense(model(), X, policy=SPARSE)


def test_a_model_without_tensors_is_an_error():
    class Silent(Block):
        def forward(self, x):
            super().forward(x)

    with pytest.raises(TypeError, match="returns NoneType"):
        assert_close_to_dense(Silent().eval(), X, policy=SPARSE)
