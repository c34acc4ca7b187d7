"""Real models: every attention call is reported, outputs agree with eager ones, and the table of coverage is right.

The kernel keeps every tile here (topk=1), so outputs differ from eager by quantization only. Most tests run the
rewritten graphs without Inductor, which would take most of the time; a few go through `backend="sparge"` whole.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import coverage_table
import pytest
import torch
from torch import Tensor, fx
from zoo import ZOO
from zoo_entry import Dense, Entry, Rewritten
from zoo_language import llama
from zoo_watch import UNIFORM, UNMASKED, EagerCall, eager, observed

import sparge_compile as sparge
from sparge_compile.backend import transform
from sparge_kernels import ops

POLICY = coverage_table.POLICY
BY_NAME = {entry.name: entry for entry in ZOO}


def models(entries: Sequence[Entry]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", entries, ids=[entry.name for entry in entries])


every_model = models(ZOO)
every_rewritten_model = models([entry for entry in ZOO if any(isinstance(found, Rewritten) for found in entry.found)])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


class Graphs:
    """A backend that rewrites as `sparge` does and runs the graphs without Inductor.

    Attributes:
        sites: what was found in each graph.
        ran: the names of the rewritten sites, whenever their graph ran; modules may share one.
    """

    def __init__(self) -> None:
        self.sites: list[list[sparge.SiteReport]] = []
        self.ran: list[str] = []
        self._modules: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        sites = transform(gm, POLICY)
        self.sites.append(sites)
        self._modules.append(gm)

        def run(*inputs: Any) -> Any:
            self.ran += [site.name for site in sites if site.rewritten]
            return gm.forward(*inputs)

        return run

    def stop_quantizing(self) -> None:
        """From now on the graphs compute exactly, without being compiled again."""
        for gm in self._modules:
            for node in gm.graph.find_nodes(op="call_function", target=torch.ops.sparge.attention.default):
                node.update_kwarg("precision", "none")
            gm.recompile()


def relative_l1(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of the output that differs most."""
    pairs = zip(actual, expected, strict=True)
    return max(((a.float() - e.float()).abs().sum() / e.float().abs().sum()).item() for a, e in pairs)


def check_sites(sites: Sequence[sparge.SiteReport], found: Sequence[Rewritten | Dense]) -> None:
    """Each site is one of those expected, and there are as many of each as expected."""
    left = list(sites)
    for expected in found:
        group = [site for site in left if fnmatch.fnmatchcase(site.name, expected.sites)]
        assert len(group) == expected.count, f"{expected.sites}: {[site.name for site in sites]}"
        left = [site for site in left if site not in group]
        for site in group:
            assert site.pattern == expected.pattern
            if isinstance(expected, Rewritten):
                assert (site.rewritten, site.reason) == (True, None), site
                assert coverage_table.mask(site) == expected.mask, site
            else:
                assert not site.rewritten, site
                assert expected.reason in site.reason
    assert not left, [site.name for site in left]


def shows(site: sparge.SiteReport, call: EagerCall) -> bool:
    """A site that was rewritten has all its sizes, another those that its call shows."""
    pairs = [(site.q_len, call.q_len), (site.k_len, call.k_len), (site.heads, call.heads)]
    pairs.append((site.head_dim, call.head_dim))
    known = [(reported, seen) for reported, seen in pairs if seen is not None and (site.rewritten or reported)]
    return site.pattern == call.pattern and all(reported == seen for reported, seen in known)


@every_model
def test_report_lists_every_attention_call_of_the_eager_run(entry: Entry):
    call, _, calls = observed(entry)

    report = coverage_table.explained(entry)

    check_sites(report.sites, entry.found)
    assert [(site, call) for site, call in zip(report.sites, calls, strict=True) if not shows(site, call)] == []
    modules = {*dict(call.module.named_modules()), type(call.module).__name__}
    assert [site.name for site in report.sites if site.name.split(":")[0] not in modules] == []


@every_rewritten_model
def test_outputs_agree_with_eager(entry: Entry):
    call, expected, _ = observed(entry)
    graphs = Graphs()
    compiled = torch.compile(call.module, backend=graphs)

    with ops.record_stats() as records:
        actual = call.run(compiled)

    assert [record.site for record in records] == graphs.ran
    assert all(record.ran == "sparse" and bool((record.density == 1).all()) for record in records)
    assert relative_l1(actual, expected) < 0.03
    graphs.stop_quantizing()  # a wrong mask, scale or head would show however small its effect
    assert relative_l1(call.run(compiled), expected) < 1e-4


@every_rewritten_model
def test_outputs_depend_on_attention(entry: Entry):
    """Else agreement with eager would say nothing: attention that is wrong must move them."""
    call, expected, calls = observed(entry)

    assert relative_l1(eager(call, UNIFORM)[0], expected) > 0.05
    if any(c.masked for c in calls):
        assert relative_l1(eager(call, UNMASKED)[0], expected) > 0.05


@pytest.mark.timeout(900)  # alone it explains every model
def test_table_of_coverage_is_what_is_found():
    committed, installed = coverage_table.committed_versions(), coverage_table.installed_versions()
    for library in ("transformers", "diffusers"):
        if committed[library] != installed[library]:
            pytest.skip(f"the table is of {library} {committed[library]}, this is {installed[library]}")

    assert coverage_table.committed_table() == coverage_table.table()
    assert coverage_table.committed_summary() == coverage_table.summary()


def test_llama_of_dynamic_length_is_compiled_once():
    """Its causal mask is then index arithmetic over a symbolic length."""
    call, shorter = llama(300), llama(203)
    graphs = Graphs()
    compiled = torch.compile(call.module.eval(), backend=graphs, dynamic=True)

    for kwargs in (call.kwargs, shorter.kwargs):
        call = call._replace(kwargs=kwargs)
        with ops.record_stats() as records:
            actual = call.run(compiled)
        assert len(records) == 2
        assert relative_l1(actual, eager(call)[0]) < 0.03

    assert len(graphs.sites) == 1
    check_sites(graphs.sites[0], BY_NAME["llama"].found)
    assert all(isinstance(site.q_len, str) for site in graphs.sites[0])


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_the_backend_with_inductor_agrees_with_eager(name: str):
    call, expected, _ = observed(BY_NAME[name])
    options = {"sparge.topk": 1.0, "sparge.min_tokens": 0}

    actual = call.run(torch.compile(call.module, backend="sparge", options=options))

    check_sites(sparge.last_report().sites, BY_NAME[name].found)
    assert relative_l1(actual, expected) < 0.03
