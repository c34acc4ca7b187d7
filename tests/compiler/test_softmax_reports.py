"""Kernels of other libraries are named in the report; what merely resembles attention is not reported."""

import pytest
import torch
import torch.nn.functional as F
from light import LightBackend, qkv, run
from torch import nn
from torch.nn.attention.flex_attention import flex_attention


def test_flex_attention_is_named():
    backend = LightBackend()
    with torch.no_grad():
        torch.compile(lambda q, k, v: flex_attention(q, k, v), backend=backend)(*qkv(dim=16, tokens=128))
    assert [(site.pattern, site.rewritten) for site in backend.sites] == [("opaque", False)]
    assert "flex_attention" in backend.reason


@pytest.mark.parametrize("name", ["flash_attn::_flash_attn_forward", "xformers::efficient_attention_forward"])
def test_the_operators_of_other_libraries_are_named(name):
    with torch.library._scoped_library(name.split("::")[0], "FRAGMENT") as library:
        library.define(f"{name.split('::')[1]}(Tensor q, Tensor k, Tensor v) -> Tensor")
        library.impl(name.split("::")[1], F.scaled_dot_product_attention, "CompositeExplicitAutograd")
        torch.library.register_fake(name, lambda q, k, v: torch.empty_like(q), lib=library)
        target = getattr(getattr(torch.ops, name.split("::")[0]), name.split("::")[1]).default
        _, backend = run(lambda q, k, v: target(q, k, v), *qkv())
    assert backend.rewritten == [False] and name.split("::")[1] in backend.reason


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, q, k, v):
        return torch.sigmoid(self.second(F.relu(self.first(q)))) * v


OTHERS = {
    "mlp": Mlp(),
    "gate": lambda q, k, v: torch.sigmoid(q @ k.mT).sum() * v,
    "graph-network": lambda q, k, v: (q @ k.mT) @ F.relu((q @ k.mT) @ v),
    "entropy": lambda q, k, v: (q @ k.mT).log_softmax(-1).sum(-1),
    "classifier": lambda q, k, v: (q @ k.mT).softmax(-1),
    "linear-attention": lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS.keys())
def test_what_merely_resembles_attention_is_left_alone(function):
    q, k, v = qkv()
    out, backend = run(function, q, k, v)
    assert not any(backend.rewritten) and torch.equal(out, function(q, k, v))
    assert not [site for site in backend.sites if "relu" in (site.reason or "") or "sigmoid" in (site.reason or "")]
