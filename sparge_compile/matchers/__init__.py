"""Finding attention in a TorchDynamo graph. A new pattern is one file here and one line in `MATCHERS`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from torch import fx

from sparge_compile.matchers import fused, mha, sdpa, softmax
from sparge_compile.matchers.naming import module_name, other_name, source_location
from sparge_compile.site import AttentionSite

MATCHERS: list[Callable[[fx.GraphModule], list[AttentionSite]]] = [
    sdpa.match,
    mha.match,
    fused.match,
    softmax.match,
]

_NESTED = "the call is inside the sub-graph of a higher-order operator (checkpoint, cond, a nested compile region)"


def find_sites(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every attention call in a TorchDynamo graph, in graph order, named. Reads the graph only."""
    sites = _match_all(gm)
    sites += [
        replace(site, unmatched=site.unmatched or _NESTED)
        for name, module in gm.named_modules()
        if name and isinstance(module, fx.GraphModule)
        for site in _match_all(module)
    ]
    names = [module_name(site.node) for site in sites]
    total, seen = Counter(names), Counter[str]()
    named = []
    for site, name in zip(sites, names, strict=True):
        seen[name] += 1
        full = f"{name}:{seen[name]}" if total[name] > 1 else name
        named.append(
            replace(site, name=full, other_name=other_name(site.node, full), source=source_location(site.node))
        )
    return named


def _match_all(gm: fx.GraphModule) -> list[AttentionSite]:
    by_node: dict[fx.Node, AttentionSite] = {}
    for match in MATCHERS:
        for site in match(gm):
            by_node.setdefault(site.node, site)
    return [by_node[node] for node in gm.graph.nodes if node in by_node]
