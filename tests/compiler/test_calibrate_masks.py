"""Calls with a mask are calibrated on what the mask shows them."""

import pytest
import torch
import torch.nn.functional as F
from calibrated import QUIET, Attends, structured_and_random

import sparge_compile as sparge
from sparge_compile import Policy
from sparge_compile.search import Call, compare, measure
from sparge_kernels import reference
from sparge_kernels.thresholds import Thresholds

TOKENS = 640


def positions(tokens=TOKENS):
    return torch.arange(tokens)[:, None], torch.arange(tokens)


def window(rows, columns):
    return (columns <= rows) & (columns > rows - 200)


def padding(rows, columns):
    return (columns < 500).expand(1, 1, 1, -1)


def position_bias(rows, columns):
    slopes = torch.tensor([0.002, 0.05]).view(1, 2, 1, 1)
    return -(rows - columns).abs() * slopes


def empty_rows(rows, columns):
    return (rows >= 70) & (columns >= 0)


MASKS = {"window": window, "padding": padding, "position-bias": position_bias, "empty-rows": empty_rows}


@pytest.mark.parametrize("precision", ["int8", "none"])
@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())
def test_one_look_gives_each_candidate_what_the_specification_gives(make, precision):
    q, k, v = (x[:, :, :TOKENS] for x in structured_and_random())
    mask = make(*positions())
    mask = mask[(None,) * (4 - mask.dim())]
    dense = F.scaled_dot_product_attention(q, k, v, mask, scale=0.2)
    call = Call(q, k, v, dense, False, 0.2, precision, mask)
    tried = (Thresholds(None, 0.3, 0.0, None), Thresholds(None, 0.9, 0.5, None), Thresholds(1.0, 1.0, 1.0, None))
    sums = measure(call, tried, "clusters")
    for number, entry in enumerate(tried):
        options = {"is_causal": False, "scale": 0.2, "precision": precision, "predictor": "clusters"}
        expected = reference.attention(q, k, v, thresholds=[entry] * 2, attn_mask=mask, **options)
        error, _, worst = compare(expected.output, dense)
        torch.testing.assert_close(sums.error[:, number], error[0].double(), rtol=5e-3, atol=1e-2)
        torch.testing.assert_close(sums.worst[:, number], worst[0].double(), rtol=1e-3, atol=1e-3)
        density = sums.kept[:, number] / sums.visible
        torch.testing.assert_close(density, expected.density[0].double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("make", [window, position_bias], ids=["window", "position-bias"])
def test_the_profile_of_a_masked_call_keeps_its_budget(make):
    q, k, v = (x[:, :, :TOKENS] for x in structured_and_random())
    mask = make(*positions())
    model = Attends(attn_mask=mask)
    profile = sparge.calibrate(model, [(q, k, v)], max_error=0.05, **QUIET)
    dense = model(q, k, v)
    with torch.no_grad():
        options = {"sparge.profile": profile, "sparge.min_tokens": 0}
        actual = torch.compile(model, backend="sparge", options=options)(q, k, v)
    errors = (actual - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
    for head, measured in enumerate(profile.measured["inner"]):
        assert errors[head] <= 0.05
        assert measured.error == pytest.approx(errors[head].item(), rel=0.02, abs=1e-4)
    (site,) = sparge.explain(model, q, k, v, policy=Policy(min_tokens=0, profile=profile)).sites
    assert site.rewritten and site.threshold_source == "profile"
