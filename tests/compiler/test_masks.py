"""What a mask sub-graph is said to mean is what it computes: in random programs, and in the masks libraries build."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from light import CLOSE, qkv, run
from mask_programs import build, programs

from sparge_compile.graph import written_nodes
from sparge_compile.masks import mask_meaning
from sparge_compile.matchers import find_sites

QUIET = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}


def open_positions(mask: torch.Tensor) -> torch.Tensor:
    """bool: where a boolean or additive mask lets a query see a key."""
    if mask.dtype == torch.bool:
        return mask
    assert ((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all(), "neither open nor closed"
    return mask == 0


def meanings(function, *args, **compile_options):
    """(the masks that a function returning (attention, mask) builds, call by call; what each compile said of them)."""
    said = []

    def backend(gm, _):
        (site,) = find_sites(gm)
        (mask,), written = site.masks, written_nodes(gm.graph)
        said.append(mask_meaning(mask, site.query.shape[2], site.key.shape[2], written).kind)
        return gm.forward

    compiled = torch.compile(function, backend=backend, **compile_options)
    with torch.no_grad():
        return [compiled(*arguments)[1] for arguments in args], said


def check(kind: str, mask: torch.Tensor, rows: int, columns: int) -> None:
    if kind in ("causal", "all_true"):
        shown = open_positions(mask).expand(*mask.shape[:-2], rows, columns)
        expected = torch.ones(rows, columns, dtype=torch.bool)
        expected = expected.tril() if kind == "causal" else expected
        assert torch.equal(shown, expected.expand_as(shown))


def attention_with(program):
    def function(q, k):
        mask = build(program, q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask), mask

    return function


def sized(rows: int, columns: int):
    return torch.ones(2, 1, rows, 2), torch.ones(2, 1, columns, 2)


ROWS, COLUMNS = ("rows", 0), ("columns", 0)
CAUSAL = ("compare", "<=", COLUMNS, ROWS)
WRAPPING = ("compare", ">=", ("sub", ("cast", ROWS, "uint8"), ("cast", COLUMNS, "uint8")), ("number", 0))


@example(program=(WRAPPING, "plain"), rows=4, columns=4)
@example(program=(("cut", CAUSAL, 1, 1), "4d"), rows=4, columns=5)
@example(program=(("cut", CAUSAL, 2, 1), "4d"), rows=4, columns=5)
@example(program=(("fill", ("not", "~", CAUSAL), "inf"), "batch"), rows=3, columns=3)
@example(program=(("triangle", 1, False), "ellipsis"), rows=3, columns=4)
@example(program=(("compare", "<", COLUMNS, ROWS), "plain"), rows=3, columns=3)
@example(program=(("not", "~", ("triu", ("ones",), 0)), "plain"), rows=3, columns=3)
@example(program=(("and", "&", ("ones",), CAUSAL), "plain"), rows=3, columns=3)
@settings(max_examples=60, **QUIET)
@given(program=programs, rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_a_claimed_meaning_is_what_the_mask_computes(program, rows, columns):
    torch._dynamo.reset()
    (mask,), (kind,) = meanings(attention_with(program), sized(rows, columns), dynamic=False)
    check(kind, mask, rows, columns)


@example(program=(("where", CAUSAL, True, "min"), "4d"), sizes=[3, 6], square=False)
@example(program=(("and", "&", CAUSAL, ("compare", "<", ROWS, ("number", 3))), "4d"), sizes=[3, 6], square=True)
@example(program=(("tril", ("ones",), 3), "plain"), sizes=[3, 6], square=True)
@example(program=(("not", "~", ("triu", ("ones",), 0)), "plain"), sizes=[3, 6], square=True)
@example(program=(("compare", "<", COLUMNS, ROWS), "4d"), sizes=[3, 6], square=True)
@example(program=(("and", "&", ("ones",), CAUSAL), "4d"), sizes=[3, 6], square=True)
@example(program=(("cut", CAUSAL, 1, 0), "4d"), sizes=[3, 6], square=True)
@settings(max_examples=20, **QUIET)
@given(program=programs, sizes=st.lists(st.integers(2, 6), min_size=2, max_size=2), square=st.booleans())
def test_a_meaning_claimed_for_dynamic_sizes_holds_for_other_sizes(program, sizes, square):
    torch._dynamo.reset()
    pairs = [(s, s if square else s + 3) for s in (sizes[0], sizes[1], 9, 2)]
    inputs = [sized(*pair) for pair in pairs]
    for x in inputs[0]:  # the lengths only: dynamic=True would make the program's own numbers symbolic as well
        torch._dynamo.maybe_mark_dynamic(x, 2)
    built, said = meanings(attention_with(program), *inputs)
    if len(said) == 1:
        for pair, mask in zip(pairs, built, strict=True):
            check(said[0], mask, *pair)


def causal(s, t):
    return torch.arange(t)[None, :] <= torch.arange(s)[:, None]


def transformers_style(s, t):
    rows, columns = torch.arange(s).view(-1)[None, None, :, None], torch.arange(t)[None, None, None, :]
    mask = rows.new_ones((), dtype=torch.bool) & (columns <= rows)
    return mask.expand(2, 1, s, t)


def packed(positions):
    """A causal mask within each text of a packed sequence, as transformers tells the texts apart."""
    first = positions[:, :1] - 1
    texts = (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(len(positions))[:, None, None, None]
    rows = torch.arange(positions.shape[1])[None, None, :, None]
    columns = torch.arange(positions.shape[1])[None, None, None, :]
    same = texts[batch, rows] == texts[batch, columns]
    return (positions[batch, columns] <= positions[batch, rows]) & same


def one_text(s, t):
    return packed(torch.arange(s)[None] + 0)


def two_texts(s, t):
    return packed(torch.cat([torch.arange(2), torch.arange(s - 2)])[None])


def every_other(s, t):
    return packed(torch.arange(0, 2 * s, 2)[None])


def padded(s, t):
    return causal(s, t) & (torch.arange(t) < torch.tensor([[t - 1], [t]]))[:, None, None, :]


def first_column_opened(s, t):
    mask = causal(s, t)
    mask[..., 0] = False
    return mask


def filled_in_place(s, t):
    mask = causal(s, t)
    mask.masked_fill_(torch.ones(s, t, dtype=torch.bool), True)
    return mask


def through_a_view(s, t):
    mask = causal(s, t)
    mask[None][0, 1:].fill_(True)
    return mask


def through_a_keyword_view(s, t):
    mask = causal(s, t)
    torch.unsqueeze(input=mask, dim=0).fill_(True)
    return mask


def through_an_einsum_view(s, t):
    mask = causal(s, t)
    torch.einsum("ij->ji", mask).fill_(True)
    return mask


def explicit_dunder(s, t):
    mask = causal(s, t)
    mask.__ior__(torch.ones_like(mask))
    return mask


def inside_checkpoint(s, t):
    mask = causal(s, t)
    torch.utils.checkpoint.checkpoint(lambda m: m.fill_(True).sum(), mask, use_reentrant=False)
    return mask


def inplace_relu(s, t):
    mask = torch.full((s, t), -math.inf).triu(1)
    F.relu(mask, True)
    return mask


def before_the_view(s, t):
    mask = causal(s, t)
    view = mask[None, None]
    mask |= True
    return view


def unsigned_difference(s, t):
    rows, columns = torch.arange(s, dtype=torch.uint8), torch.arange(t, dtype=torch.uint8)
    return rows[:, None] - columns[None, :] >= 0


def narrow_counter(s, t):
    return torch.arange(t).to(torch.int8)[None, :] <= torch.arange(s)[:, None] + 0 * torch.arange(t)[None, :].to(
        torch.int8
    )


@torch.library.custom_op("sparge_tests::tril", mutates_args=())
def not_tril(x: torch.Tensor) -> torch.Tensor:
    return x.tril(5)


@not_tril.register_fake
def _(x):
    return torch.empty_like(x)


def test_conditions_combined_many_times_are_read_quickly_or_not_at_all():
    def function(q, k):
        mask = causal(q.shape[2], k.shape[2])
        for _ in range(64):
            mask = mask & mask
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask), mask

    _, (kind,) = meanings(function, sized(6, 6))
    assert kind == "causal"


def zero_times_infinity(s, t):
    return (1 - torch.ones(s, t).tril()) * -math.inf


def numbers_that_are_no_mask(s, t):
    return (torch.ones(s, t, dtype=torch.long).tril() * 2).bool()


def bytes_that_are_no_mask(s, t):
    return ((1 - torch.ones(s, t, dtype=torch.uint8).tril()) * 255 + 1).bool()


MEANINGS = {
    "causal": (causal, "causal"),
    "causal-flipped": (lambda s, t: torch.arange(s)[:, None] >= torch.arange(t), "causal"),
    "not-future": (lambda s, t: ~(torch.arange(t) > torch.arange(s)[:, None]), "causal"),
    "tril": (lambda s, t: torch.ones(s, t, dtype=torch.bool).tril(), "causal"),
    "additive-inf": (lambda s, t: torch.full((s, t), -math.inf).triu(1), "causal"),
    "additive-min": (lambda s, t: torch.where(causal(s, t), 0.0, torch.finfo(torch.float32).min), "causal"),
    "ones": (lambda s, t: torch.ones(s, t, dtype=torch.bool), "all_true"),
    "zeros": (lambda s, t: torch.zeros(1, 1, s, t), "all_true"),
    "one-row": (lambda s, t: torch.ones(1, t, dtype=torch.bool), "all_true"),
    "two-causal": (lambda s, t: causal(s, t) & torch.ones(s, t, dtype=torch.bool).tril(0), "causal"),
    "wide-window": (lambda s, t: causal(s, t) & (torch.arange(s)[:, None] - torch.arange(t) < 100), "causal"),
    "window": (lambda s, t: causal(s, t) & (torch.arange(s)[:, None] - torch.arange(t) < 3), "window"),
    "arange-with-end-by-name": (lambda s, t: torch.arange(2, end=s + 2)[:, None] >= torch.arange(t), "data"),
    "lowest-of-a-narrower-type": (lambda s, t: torch.where(causal(s, t), 0.0, -65504.0), "data"),
    "lowest-then-widened": (lambda s, t: torch.full((s, t), -65504.0, dtype=torch.half).triu(1).float(), "data"),
    "an-operator-of-somebody-elses": (lambda s, t: torch.ops.sparge_tests.tril(torch.ones(s, t).bool()), "data"),
    "offset-causal": (lambda s, t: torch.ones(s, t, dtype=torch.bool).tril(2), "data"),
    "strictly-past": (lambda s, t: torch.arange(t) < torch.arange(s)[:, None], "data"),
    "upper-triangle": (lambda s, t: torch.full((s, t), -math.inf).tril(-1), None),
    "padding": (padded, "data"),
    "sliced": (lambda s, t: torch.ops.aten.slice.Tensor(causal(s + 2, t), 0, 0, s), "causal"),
    "sliced-from-there": (lambda s, t: torch.ops.aten.slice.Tensor(causal(s + 2, t), -2, 2, s + 2), "data"),
    "sliced-from-the-end": (lambda s, t: torch.ops.aten.slice.Tensor(causal(s + 2, t), 0, -s), "data"),
    "soft-bias": (lambda s, t: -(torch.arange(s)[:, None] - torch.arange(t)).abs().float(), "data"),
    "minus-one": (lambda s, t: torch.zeros(s, t).masked_fill(~causal(s, t), -1.0), "data"),
    "zero-or-one": (lambda s, t: causal(s, t).float(), "data"),
    "item-assignment": (first_column_opened, "data"),
    "masked-fill-in-place": (filled_in_place, "data"),
    "write-through-view": (through_a_view, "data"),
    "write-through-keyword-view": (through_a_keyword_view, "data"),
    "write-through-einsum-view": (through_an_einsum_view, "data"),
    "write-by-explicit-dunder": (explicit_dunder, "data"),
    "write-inside-checkpoint": (inside_checkpoint, "data"),
    "positional-inplace": (inplace_relu, "data"),
    "view-then-write": (before_the_view, "data"),
    "unsigned-difference": (unsigned_difference, None),
    "transformers": (transformers_style, None),
    "one-text": (one_text, "causal"),
    "zero-times-infinity": (zero_times_infinity, "data"),
    "twice-tril": (numbers_that_are_no_mask, None),
    "bytes": (bytes_that_are_no_mask, None),
    "two-texts": (two_texts, None),
    "every-other": (every_other, None),
    "equal": (lambda s, t: torch.arange(t)[None, :] == torch.arange(s)[:, None], None),
    "from-the-end": (lambda s, t: torch.arange(t)[torch.arange(t) - 1][None] <= torch.arange(s)[:, None], None),
}


SQUARE = (one_text, two_texts, every_other)


@pytest.mark.parametrize(("make", "meaning"), MEANINGS.values(), ids=MEANINGS.keys())
def test_a_mask_means_what_it_computes(make, meaning):
    rows, columns = 7, 7 if make in SQUARE else 9
    q, k, v = qkv(tokens=rows, keys=columns)

    def function(q, k, v):
        mask = make(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), mask

    (mask,), (kind,) = meanings(function, (q, k, v))
    check(kind, mask, rows, columns)
    assert meaning is None or kind == meaning
    torch._dynamo.reset()
    out, _ = run(function, q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out[0], expected, equal_nan=True, **CLOSE)


def test_an_int8_counter_that_wraps_is_not_causal():
    def function(q):
        rows, columns = torch.arange(200)[:, None], torch.arange(200).to(torch.int8)[None, :]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=columns <= rows), columns <= rows

    (mask,), (kind,) = meanings(function, (torch.randn(1, 1, 200, 8),))
    check(kind, mask, 200, 200)


def test_a_window_is_decided_by_the_length():
    def function(q):
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        mask = (distance >= 0) & (distance < 8)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask), mask

    for length, meaning in ((8, "causal"), (9, "window")):
        _, said = meanings(function, (torch.ones(1, 1, length, 2),), dynamic=False)
        assert said == [meaning]


def test_a_mask_from_outside_the_graph_is_data():
    outside = torch.ones(4, 4, dtype=torch.bool).tril()
    q = torch.randn(1, 1, 4, 8)
    _, said = meanings(lambda q, m: (F.scaled_dot_product_attention(q, q, q, attn_mask=m), m), (q, outside))
    _, of_closure = meanings(lambda q: (F.scaled_dot_product_attention(q, q, q, attn_mask=outside), outside), (q,))
    assert said == of_closure == ["data"]


def test_causal_and_padding_of_transformers_models_are_told_apart_with_dynamic_lengths():
    def function(q, keep):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=causal(q.shape[2], q.shape[2]) & keep), keep

    lengths = (5, 11)
    _, said = meanings(
        function, *((torch.ones(1, 1, n, 2), torch.ones(n, dtype=torch.bool)) for n in lengths), dynamic=True
    )
    assert said == ["data"]
