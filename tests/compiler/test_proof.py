"""A site read wrongly does not get past the check by numbers, whatever its sizes; the check costs little."""

import math
import time
from dataclasses import replace

import pytest
import torch
from light import LightBackend, is_rewritten, qkv, run, stays_dense
from softmax_programs import SPELLINGS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparge_compile import backend, claim, proof
from sparge_compile.masks import MaskMeaning
from sparge_compile.operands import Operand
from sparge_compile.site import Mask

MASK = (torch.arange(144) % 5 != 0).view(12, 12).index_fill(0, torch.tensor([4]), False)


def causal(q, k, v):
    return (q @ k.mT * 0.3).masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf).softmax(-1) @ v


def padded(q, k, v):
    return (q @ k.mT * 0.3).masked_fill(~MASK, -1e9).softmax(-1) @ v


def merged(q, k, v):
    q, k, v = (x.reshape(4, 12, 8) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT).view(2, 2, 12, 12) + torch.eye(12)).view(4, 12, 12).softmax(-1), v)


def grouped(q, k, v):
    q, k, v = (x.repeat_interleave(2, 1) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


def permuted(operand, *order):
    return replace(operand, dims=tuple(operand.dims[place] for place in order))


def without_masks(site):
    return replace(site, masks=())


def with_masks_turned(site):
    return replace(site, masks=tuple(Mask(mask.operand, not mask.hides) for mask in site.masks))


def with_masks_transposed(site):
    return replace(site, masks=tuple(Mask(permuted(m.operand, 0, 1, 3, 2), m.hides) for m in site.masks))


SABOTAGE = {
    "scale": (SPELLINGS["matmul"], lambda site: replace(site, scale=site.scale * 1.01)),
    "scale-forgotten": (SPELLINGS["matmul"], lambda site: replace(site, scale=None)),
    "scale-sign": (SPELLINGS["no-scale"], lambda site: replace(site, scale=-1.0)),
    "default-scale": (SPELLINGS["no-scale"], lambda site: replace(site, scale=8**-0.5)),
    "keys-for-queries": (SPELLINGS["matmul"], lambda site: replace(site, query=site.key, key=site.query)),
    "keys-for-values": (SPELLINGS["einsum-bhsd"], lambda site: replace(site, key=site.value, value=site.key)),
    "heads-for-batch": (SPELLINGS["matmul"], lambda site: replace(site, value=permuted(site.value, 1, 0, 2, 3))),
    "output-transposed": (SPELLINGS["matmul"], lambda site: replace(site, output=permuted(site.output, 1, 0, 2, 3))),
    "causal-for-nothing": (SPELLINGS["matmul"], lambda site: replace(site, is_causal=True)),
    "mask-forgotten": (causal, without_masks),
    "mask-turned": (padded, with_masks_turned),
    "mask-transposed": (padded, with_masks_transposed),
    "empty-rows-zero": (padded, lambda site: replace(site, empty_rows="zero")),
    "empty-rows-nan": (padded, lambda site: replace(site, empty_rows="nan")),
}
# Sizes are written into this program.
SABOTAGE_OF_MERGED = {
    "bias-forgotten": without_masks,
    "merged-the-other-way": lambda site: replace(site, query=permuted(site.query, 1, 0, 2, 3)),
}


@pytest.fixture
def sabotaged(monkeypatch):
    find_sites = backend.find_sites

    def install(change):
        monkeypatch.setattr(backend, "find_sites", lambda gm: [change(site) for site in find_sites(gm)])

    return install


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("attention", "change"), SABOTAGE.values(), ids=SABOTAGE.keys())
def test_a_site_that_was_read_wrongly_stays_dense(attention, change, dynamic, sabotaged):
    sabotaged(change)
    stays_dense(attention, *qkv(), reason="not proven equal", dynamic=dynamic)


@pytest.mark.parametrize("change", SABOTAGE_OF_MERGED.values(), ids=SABOTAGE_OF_MERGED.keys())
def test_batch_and_heads_in_one_dimension_read_wrongly_stay_dense(change, sabotaged):
    sabotaged(change)
    stays_dense(merged, *qkv(), reason="not proven equal")


@pytest.mark.parametrize("tokens", [(130, 200), (300, 300)], ids=str)
def test_a_wrong_scale_shows_in_long_calls_too(tokens, sabotaged):
    sabotaged(lambda site: replace(site, scale=site.scale * 1.001))
    q, k, v = qkv(tokens=tokens[0], keys=tokens[1])
    stays_dense(SPELLINGS["matmul"], q, k, v, reason="not proven equal")


def test_a_wrong_repetition_shows(sabotaged, monkeypatch):
    unrepeat = claim.unrepeat

    def of_other_heads(operand, written):
        found, repeats = unrepeat(operand, written)
        return (Operand(found.node, (1, 0, 2, 3)), repeats) if repeats > 1 else (found, repeats)

    monkeypatch.setattr(claim, "unrepeat", of_other_heads)
    stays_dense(grouped, *qkv(), reason="not proven equal")


def test_a_mask_taken_for_causal_shows(monkeypatch):
    monkeypatch.setattr(claim, "mask_meaning", lambda *_: MaskMeaning("causal"))

    def nearly(q, k, v):
        return (q @ k.mT).masked_fill(torch.ones(12, 12).triu(2).bool(), -math.inf).softmax(-1) @ v

    stays_dense(nearly, *qkv(), reason="not proven equal")


def test_what_the_check_cannot_run_stays_dense(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(proof, "_step", fails)
    stays_dense(SPELLINGS["matmul"], *qkv(), reason="checking failed with RuntimeError: no such kernel")


def test_calls_of_one_node_are_not_checked(monkeypatch):
    monkeypatch.setattr(backend, "prove", lambda *_: pytest.fail("checked"))
    x = torch.randn(1, 2, 12, 8)
    compiled = torch.compile(torch.nn.functional.scaled_dot_product_attention, backend=LightBackend())
    with torch.no_grad():
        assert compiled(x, x, x).shape == x.shape


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in (*args, out):
            if isinstance(x, torch.Tensor) and type(x) is torch.Tensor:
                self.largest = max(self.largest, x.numel())
        return out


LONG = {
    "many-tokens": (2, 32, 8192, 128),
    "many-heads": (64, 32, 4096, 64),
    "many-batches": (4096, 8, 77, 64),
    "as-many-tokens-as-channels": (2, 8, 128, 128),
    "as-many-batches-as-tokens": (1024, 8, 1024, 64),
}


@pytest.mark.parametrize("shape", LONG.values(), ids=LONG.keys())
@pytest.mark.parametrize("is_causal", [False, True], ids=["open", "causal"])
def test_large_calls_are_checked_on_small_tensors_and_in_little_time(shape, is_causal, monkeypatch):
    seconds, largest, prove = [], [], backend.prove

    def timed(decision, _):
        with Watch() as watch:
            prove(decision, {})  # warm
        largest.append(watch.largest)
        start = time.process_time()
        refusal = prove(decision, {})
        seconds.append(time.process_time() - start)
        return refusal

    def attention(q, k, v):
        scores = q @ k.mT * 0.1
        if is_causal:
            scores = scores.masked_fill(torch.ones(shape[2], shape[2]).triu(1).bool(), -math.inf)
        return scores.softmax(-1) @ v

    monkeypatch.setattr(backend, "prove", timed)
    light = LightBackend()

    def only_decide(gm, inputs):
        light(gm, inputs)
        return lambda *_: (torch.zeros(1),)

    with torch.no_grad(), FakeTensorMode():
        q, k, v = (torch.empty(shape) for _ in range(3))
        torch.compile(attention, backend=only_decide)(q, k, v)
    assert light.rewritten == [True], light.reason
    assert max(largest) <= 2**22 and min(seconds) < 2.0


def stacked(layers):
    """`layers` of attention, one after another."""

    def forward(q, k, v):
        for layer in layers:
            q = layer(q, k, v)
        return q

    return forward


@pytest.fixture
def checks(monkeypatch):
    """The decisions that are checked by numbers."""
    found, check = [], proof._difference_of
    monkeypatch.setattr(proof, "_difference_of", lambda *a: (found.append(a[0]), check(*a))[1])
    return found


def test_equal_layers_are_checked_once(checks):
    is_rewritten(stacked([padded] * 8), *qkv(), tolerance={"rtol": 1e-3, "atol": 1e-3})
    assert len(checks) == 1


def filled(fill):
    return lambda q, k, v: (q @ k.mT * 0.3).masked_fill(~MASK, fill).softmax(-1) @ v


NEARLY_EQUAL = {
    "scale": lambda q, k, v: (q @ k.mT * 0.31).masked_fill(~MASK, -1e9).softmax(-1) @ v,
    "division": lambda q, k, v: (q @ k.mT / 0.3).masked_fill(~MASK, -1e9).softmax(-1) @ v,
    "fill": filled(-1e5),
    "infinite-fill": filled(-math.inf),
    "hidden": lambda q, k, v: torch.where(MASK, q @ k.mT * 0.3, -1e9).softmax(-1) @ v,
    "keys-for-values": lambda q, k, v: padded(q, v, k),
    "shape-of-the-mask": lambda q, k, v: (q @ k.mT * 0.3).masked_fill(~MASK[:1], -1e9).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", (q @ k.mT * 0.3).masked_fill(~MASK, -1e9).softmax(-1), v),
    "types": lambda q, k, v: (q @ k.mT * 0.3).double().masked_fill(~MASK, -1e9).softmax(-1).float() @ v,
    "copies": lambda q, k, v: (q @ k.mT * 0.3).clone().masked_fill(~MASK, -1e9).softmax(-1) @ v,
}


@pytest.mark.parametrize("other", NEARLY_EQUAL.values(), ids=NEARLY_EQUAL.keys())
def test_layers_that_differ_are_checked_each(other, checks):
    is_rewritten(stacked([padded, other, padded]), *qkv(), tolerance={"rtol": 1e-3, "atol": 1e-3})
    assert len(checks) == (1 if other is NEARLY_EQUAL["keys-for-values"] else 2)


@pytest.mark.parametrize("change", [change for attention, change in SABOTAGE.values() if attention is padded])
def test_one_of_equal_layers_that_was_read_wrongly_is_found_out(change, monkeypatch):
    find_sites = backend.find_sites

    def with_a_wrong_one(gm):
        first, second, third = find_sites(gm)
        return [first, change(second), third]

    monkeypatch.setattr(backend, "find_sites", with_a_wrong_one)
    _, light = run(stacked([padded] * 3), *qkv())
    assert light.rewritten == [True, False, True]
