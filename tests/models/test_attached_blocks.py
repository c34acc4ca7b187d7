"""Real models compiled block by block, as diffusers does it: each block keeps the thresholds its profile names."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import sparge_compile as sparge
from sparge_compile.backend import transform
from sparge_kernels.thresholds import Thresholds

pytest.importorskip("diffusers")
from zoo import ZOO

POLICY = sparge.Policy(min_tokens=100, precision="none")


class Backend:
    """Rewrites each graph and runs it without Inductor."""

    def __init__(self, policy: sparge.Policy) -> None:
        self.policy, self.sites = policy, []

    def __call__(self, gm: fx.GraphModule, _):
        self.sites.append([(s.rewritten, s.threshold_source) for s in transform(gm, self.policy)])
        return gm.forward


@pytest.mark.parametrize("name, sites", [("wan", "blocks.{}.attn1"), ("flux", "single_transformer_blocks.{}.attn")])
def test_repeated_blocks_bring_their_own_thresholds_in_as_few_graphs_as_without(name, sites):
    torch._dynamo.reset()
    call = next(entry for entry in ZOO if entry.name == name).call()
    heads = 4
    profile = sparge.Profile(
        {sites.format(n): tuple(Thresholds((n + h + 1) / 8, 1.0, -1.0, None) for h in range(heads)) for n in range(2)}
    )
    with torch.no_grad():
        constants = Backend(sparge.policy.replace(POLICY, {"profile": profile}))
        (expected,) = call.run(torch.compile(call.module, backend=constants))
        with sparge.attach(call.module, profile):
            backend = Backend(POLICY)
            call.module.compile_repeated_blocks(backend=backend, fullgraph=True)
            (out,) = call.run()
            torch._dynamo.reset()
            shared = len(backend.sites)
        call.run()
    assert torch.equal(out, expected)
    assert any((True, "attached profile") in graph for graph in backend.sites)
    assert len(backend.sites) == 2 * shared, "the blocks share fewer graphs attached than not"
    torch._dynamo.reset()
