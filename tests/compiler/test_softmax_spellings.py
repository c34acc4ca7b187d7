"""Attention written out by hand becomes the operator, in every spelling, with eager's numbers, dtype and strides."""

import pytest
import torch
from light import is_rewritten, qkv
from softmax_programs import SPELLINGS, merged

BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}
every_spelling = pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
# Sizes are written into these programs.
STATIC = {"baddbmm", "baddbmm-mask", "baddbmm-method", "in-place", "constant-tensors"}
DYNAMIC = {name: spelling for name, spelling in SPELLINGS.items() if name not in STATIC}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def marked(tensors):
    """Batch and tokens are dynamic."""
    for x in tensors:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 2)
    return tensors


@every_spelling
def test_every_spelling_becomes_one_operator(spelling):
    backend = is_rewritten(spelling, *qkv())
    assert [site.pattern for site in backend.sites] == ["softmax"] and len(backend.operators()) == 1


@pytest.mark.parametrize("name", DYNAMIC)
def test_every_spelling_becomes_one_operator_with_dynamic_sizes(name):
    spelling = SPELLINGS[name]
    backend = is_rewritten(spelling, *marked(qkv(batch=3, tokens=21)))
    assert len(backend.operators()) == 1
    assert name == "cross" or not isinstance(backend.sites[0].q_len, int)


def test_every_size_may_be_dynamic():
    is_rewritten(SPELLINGS["matmul"], *qkv(), dynamic=True)


@pytest.mark.parametrize("name", ["matmul", "baddbmm", "bart", "einsum-bshd", "fp32-softmax", "upcast", "float-scores"])
def test_narrow_types_keep_their_type_and_read_narrow_operands(name):
    q, k, v = qkv(dtype=torch.bfloat16)
    backend = is_rewritten(SPELLINGS[name], q, k, v, tolerance=BFLOAT16)
    (node,) = backend.operators()
    assert all(x.meta["example_value"].dtype == torch.bfloat16 for x in node.args[:3])


def test_without_a_scale_in_the_graph_there_is_none():
    scales = [
        is_rewritten(SPELLINGS[name], *qkv()).operators()[0].kwargs["scale"]
        for name in ("no-scale", "scale-on-q", "scale-on-both", "scale-twice", "division")
    ]
    assert scales[:3] == [1.0, 1.0, 1.0] and scales[3] == pytest.approx(0.3 / 0.7)
    assert scales[4] == pytest.approx(8**-0.5)


@pytest.mark.parametrize("tokens", [(7, 300), (300, 200), (129, 65)], ids=str)
def test_long_calls_are_checked_on_short_ones(tokens):
    q_len, k_len = tokens
    q, k, v = qkv(tokens=q_len, keys=k_len)
    is_rewritten(lambda q, k, v: torch.softmax(q @ k.mT / 3, -1) @ v, q, k, v)


@pytest.mark.parametrize(
    "shape", [(2, 8, 8, 8), (8, 2, 12, 8), (1, 1, 32, 32), (40, 2, 20, 8), (3, 40, 40, 8), (1, 64, 64, 64)], ids=str
)
def test_sizes_that_are_equal_by_chance_do_not_confuse_the_check(shape):
    q, k, v = (torch.randn(shape) for _ in range(3))
    is_rewritten(
        lambda q, k, v: torch.softmax((q @ k.mT / 3).view(shape[0], shape[1], *shape[2:3], -1), -1) @ v, q, k, v
    )


def test_batch_and_heads_in_one_dimension_are_told_apart():
    q, k, v = qkv(batch=3, heads=4)
    backend = is_rewritten(SPELLINGS["bmm"], q, k, v)
    (node,) = backend.operators()
    assert [tuple(x.meta["example_value"].shape) for x in node.args[:3]] == [(3, 4, 12, 8)] * 3
    assert backend.sites[0].heads == 4


def _repeat(x):
    return (
        x[:, :, None]
        .expand(x.shape[0], x.shape[1], 3, x.shape[2], x.shape[3])
        .reshape(x.shape[0], x.shape[1] * 3, x.shape[2], x.shape[3])
    )


GROUPED = {
    "expand": lambda q, k, v: (q @ _repeat(k).transpose(2, 3) * 0.3).softmax(-1) @ _repeat(v),
    "repeat-interleave": lambda q, k, v: (
        (q @ k.repeat_interleave(3, dim=1).mT * 0.3).softmax(-1) @ v.repeat_interleave(3, dim=1)
    ),
    "merged": lambda q, k, v: torch.bmm(
        torch.bmm(merged(q), merged(_repeat(k)).transpose(1, 2)).softmax(-1), merged(_repeat(v))
    ),
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, _repeat(k)).softmax(-1), _repeat(v)
    ),
    "upcast": lambda q, k, v: (q.double() @ _repeat(k).double().mT).softmax(-1).float() @ _repeat(v),
}


@pytest.mark.parametrize("attention", GROUPED.values(), ids=GROUPED.keys())
@pytest.mark.parametrize("mark", [tuple, marked], ids=["static", "dynamic"])
def test_the_operator_reads_keys_and_values_that_were_repeated_unrepeated(attention, mark):
    backend = is_rewritten(attention, *mark(qkv(batch=3, heads=6, kv_heads=2)))
    (node,) = backend.operators()
    assert node.kwargs["enable_gqa"] and [x.meta["example_value"].shape[1] for x in node.args[1:3]] == [2, 2]


def test_one_head_of_keys_for_all_queries_is_read_as_it_is():
    backend = is_rewritten(SPELLINGS["matmul"], *qkv(heads=4, kv_heads=1))
    assert backend.operators()[0].kwargs["enable_gqa"]


def test_under_autocast_the_operator_computes_in_the_narrow_type():
    def attention(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.softmax(q @ k.mT / 3, -1) @ v

    assert is_rewritten(attention, *qkv(), tolerance=BFLOAT16).sites[0].dtype == "bfloat16"


def test_each_of_several_calls_is_rewritten():
    def twice(q, k, v):
        x = SPELLINGS["matmul"](q, k, v)
        return SPELLINGS["baddbmm"](x, k, v)

    backend = is_rewritten(twice, *qkv())
    assert backend.rewritten == [True, True] and len({site.name for site in backend.sites}) == 2
