"""What `explain` says of a run besides its table, what it refuses, and by which names it calls the sites."""

import functools

import pytest
import torch
from light import EXACT, Attention, Stack
from torch import nn

import sparge_compile as sparge
from sparge_compile import Policy

X = torch.randn(1, 6, 16)


def test_a_run_without_gradients_says_so_where_the_models_own_has_them():
    model, words = Attention().eval(), "run without gradients"
    assert words in " ".join(sparge.explain(model, X, policy=EXACT).notes)
    with torch.no_grad():
        assert words not in " ".join(sparge.explain(model, X, policy=EXACT).notes)
    assert words not in " ".join(sparge.explain(model.requires_grad_(False), X, policy=EXACT).notes)


def test_calls_of_the_operator_that_the_model_itself_makes_are_said():
    class Own(nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (2, 8)).transpose(1, 2)
            return sparge.attention(q, q, q, policy=EXACT) + sparge.attention(q, q, q, policy=EXACT)

    with torch.no_grad():
        (note,) = sparge.explain(nn.Sequential(Attention(), Own()).eval(), X, policy=EXACT).notes
    assert note.startswith("Not listed: 2 calls of sparge_compile.attention")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"policy": {"topk": 0.3}}, "must be a sparge_compile.Policy"),
        ({"tile_maps": 5}, "must be a tuple of patterns"),
        ({"model": "blocks"}, "takes a module or a function"),
    ],
    ids=["policy", "tile_maps", "model"],
)
def test_arguments_of_the_wrong_type_are_refused_in_words(arguments, said):
    with pytest.raises(TypeError, match=said):
        sparge.explain(arguments.pop("model", Attention()), X, **arguments)


def test_a_pattern_of_tile_maps_that_fits_nothing_is_said():
    with torch.no_grad():
        report = sparge.explain(Stack(2).eval(), X, policy=EXACT, tile_maps=("blocks.0", "block.*"))
    assert [note for note in report.notes if "tile_maps" in note] == [
        "tile_maps: no rewritten call has a name like 'block.*'"
    ]
    with pytest.raises(TypeError, match="whole number"):
        report.tile_map("blocks.0", True)


def test_dynamic_lengths_are_those_of_the_run():
    compiled = torch.compile(Attention().eval(), dynamic=True)
    (site,) = sparge.explain(compiled, torch.randn(1, 7, 16), policy=EXACT).sites
    assert (site.q_len, site.k_len) == (7, 7)


def decorated(forward, breaks=""):
    """As `deprecate_kwarg` of transformers does: the frame's own variable is `args`, whose first item is the module."""

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        if breaks == "before":
            torch._dynamo.graph_break()
        out = forward(*args, **kwargs)
        if breaks == "after":
            torch._dynamo.graph_break()
        return out

    return wrapper


def test_modules_keep_their_names_behind_a_decorator_that_takes_anything():
    class Decorated(Stack):
        forward = decorated(Stack.forward)

    model, names = Decorated(2).eval(), ["blocks.0", "blocks.1"]
    policy = Policy(min_tokens=0)
    assert [site.name for site in sparge.explain(model, X, policy=policy).sites] == names
    profile = sparge.calibrate(model, [X], policy=policy, progress=False)
    assert list(profile.sites) == names
    sparge.attach(model, profile)
    report = sparge.explain(model, X, policy=policy)
    assert [(site.name, site.threshold_source) for site in report.sites] == [
        (name, "attached profile") for name in names
    ]


@pytest.mark.parametrize("breaks", ["before", "after"])
def test_modules_keep_their_names_where_such_a_decorator_breaks_the_graph(breaks):
    class Decorated(Stack):
        forward = decorated(Stack.forward, breaks)

    report = sparge.explain(Decorated(2).eval(), X, policy=EXACT)
    assert [(site.name, site.rewritten) for site in report.sites] == [("blocks.0", True), ("blocks.1", True)]
