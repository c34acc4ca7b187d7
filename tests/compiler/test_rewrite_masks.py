"""How masks reach the operator: as given where that is possible, and made once for the layers that share them."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from light import is_rewritten, qkv

NAN_TOO = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
MASK = (torch.arange(144) % 3 != 0).view(12, 12).index_fill(0, torch.tensor([4]), False)


def written_out(q, k, v, hidden, fill=-math.inf):
    return (q @ k.mT * 0.3).masked_fill(hidden, fill).softmax(-1) @ v


def bases(backend):
    """(the node that each operator's mask is a view of, is its True "hidden")."""
    found = []
    for node in backend.operators():
        mask = node.kwargs["attn_mask"]
        while mask.op == "call_method" and mask.target == "unsqueeze":
            mask = mask.args[0]
        found.append((mask, node.kwargs["mask_hides"]))
    return found


NEGATIONS = {
    "none": (lambda m: m, True),
    "operator": (lambda m: ~m, False),
    "method": (lambda m: m.logical_not(), False),
    "function": (torch.bitwise_not, False),
    "two": (lambda m: ~m.logical_not(), True),
}


@pytest.mark.parametrize("negate, hides", NEGATIONS.values(), ids=NEGATIONS.keys())
@pytest.mark.parametrize("fill", [-math.inf, -1e9], ids=["inf", "finite"])
def test_a_negated_mask_is_read_from_what_it_negates(negate, hides, fill):
    backend = is_rewritten(lambda q, k, v, m: written_out(q, k, v, negate(m), fill), *qkv(), MASK, tolerance=NAN_TOO)
    ((mask, hiding),) = bases(backend)
    assert mask.op == "placeholder" and hiding == hides


def test_masks_that_all_hide_are_joined_and_left_to_hide():
    def attention(q, k, v, a, b):
        return (q @ k.mT * 0.3).masked_fill(a, -1e9).masked_fill(b, -1e9).softmax(-1) @ v

    (node,) = is_rewritten(attention, *qkv(), MASK, MASK.mT.contiguous()).operators()
    assert node.kwargs["mask_hides"] and node.kwargs["attn_mask"].target is torch.logical_or


def test_one_that_hides_and_one_that_attends_hold_together():
    def attention(q, k, v, a, b):
        return torch.where(b, (q @ k.mT * 0.3).masked_fill(a, -1e9), -1e9).softmax(-1) @ v

    (node,) = is_rewritten(attention, *qkv(), MASK, MASK.mT.contiguous()).operators()
    assert not node.kwargs["mask_hides"]


def test_what_is_negated_and_then_written_is_not_read_later():
    def attention(q, k, v, mask):
        mask = mask.clone()
        hidden = ~mask
        mask.fill_(True)
        return written_out(q, k, v, hidden, -1e9)

    ((mask, hiding),) = bases(is_rewritten(attention, *qkv(), MASK))
    assert mask.target is operator.invert and hiding


def position_bias():
    """Heads innermost, as a table of biases per head gives it."""
    return torch.linspace(-3, 3, 12 * 12 * 2).view(1, 12, 12, 2).permute(0, 3, 1, 2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_layers_share_a_mask_whose_keys_are_apart_as_it_is(dynamic):
    def two_layers(q, k, v, mask):
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v, mask), k, v, mask)

    q, k, v = qkv()
    bias = position_bias()
    for tensor, dims in ((q, (2,)), (k, (2,)), (v, (2,)), (bias, (2, 3))):
        torch._dynamo.mark_dynamic(tensor, dims if dynamic else ())
    (first, _), (second, _) = bases(is_rewritten(two_layers, q, k, v, bias))
    assert first is second and first.op == "placeholder"


def test_a_mask_written_between_two_layers_is_read_twice():
    def layers(q, k, v, bias):
        bias = bias.clone()
        first = F.scaled_dot_product_attention(q, k, v, bias)
        bias.mul_(-2)
        return F.scaled_dot_product_attention(first, k, v, bias)

    assert len(is_rewritten(layers, *qkv(), position_bias()).operators()) == 2
