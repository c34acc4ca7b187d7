"""Models of transformers and diffusers: every attention call is reported, and outputs agree with eager ones.

The kernel keeps every tile here (topk=1), so outputs differ from eager by quantization only. Most tests run the
rewritten graphs without Inductor, which would take most of the time; a few go through `backend="sparge"` whole.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from zoo import ZOO, llama
from zoo_entry import Call, Dense, Entry, Rewritten

import sparge_compile as sparge
from sparge_compile.backend import transform
from sparge_kernels import ops

POLICY = sparge.Policy(topk=1.0, min_tokens=0)
BY_NAME = {entry.name: entry for entry in ZOO}

every_model = pytest.mark.parametrize("entry", ZOO, ids=[entry.name for entry in ZOO])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@dataclass(frozen=True)
class EagerCall:
    """One F.scaled_dot_product_attention call as the model made it."""

    q_len: int
    k_len: int
    heads: int
    head_dim: int
    masked: bool
    is_causal: bool


@dataclass
class WatchAttention(TorchFunctionMode):
    """Records every attention call inside; `instead` runs in place of each, with the call's arguments by name."""

    instead: Callable[..., Tensor] | None = None
    calls: list[EagerCall] = field(default_factory=list)
    softmaxes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (F.softmax, torch.softmax, Tensor.softmax):
            self.softmaxes += 1
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        named = {**dict(zip(_PARAMETERS, args, strict=False)), **kwargs}
        query, key = named["query"], named["key"]
        masked, is_causal = named.get("attn_mask") is not None, named.get("is_causal", False)
        self.calls.append(EagerCall(query.shape[2], key.shape[2], query.shape[1], query.shape[3], masked, is_causal))
        return (self.instead or function)(**named)


_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def uniform(query: Tensor, **others: Any) -> Tensor:
    """Attention that weighs all keys it may attend to alike."""
    return F.scaled_dot_product_attention(query=torch.zeros_like(query), **others)


def unmasked(**arguments: Any) -> Tensor:
    """Attention that forgets its mask."""
    return F.scaled_dot_product_attention(**{**arguments, "attn_mask": None, "is_causal": False})


def eager(call: Call, instead: Callable[..., Tensor] | None = None) -> tuple[list[Tensor], WatchAttention]:
    with WatchAttention(instead) as watch:
        return call.run(), watch


class Graphs:
    """A backend that rewrites as `sparge` does and runs the graphs without Inductor.

    Attributes:
        sites: what was found in each graph.
    """

    def __init__(self) -> None:
        self.sites: list[list[sparge.SiteReport]] = []
        self._modules: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.sites.append(transform(gm, POLICY))
        self._modules.append(gm)
        return lambda *inputs: gm.forward(*inputs)

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
            if isinstance(expected, Rewritten):
                assert (site.rewritten, site.reason) == (True, None), site
                assert site.is_causal == expected.is_causal, site
            else:
                assert not site.rewritten, site
                assert expected.reason in site.reason
    assert not left, [site.name for site in left]


@every_model
def test_report_lists_every_attention_call_of_the_eager_run(entry: Entry):
    call = entry.call()
    _, watch = eager(call)

    report = sparge.explain(call.module, *call.args, policy=POLICY, **call.kwargs)

    sizes = [(site.q_len, site.k_len, site.heads, site.head_dim) for site in report.sites]
    assert sizes == [(c.q_len, c.k_len, c.heads, c.head_dim) for c in watch.calls]
    assert watch.softmaxes == 0  # else there is attention that the calls do not show
    check_sites(report.sites, entry.found)
    modules = dict(call.module.named_modules())
    assert [site.name for site in report.sites if site.name.split(":")[0] not in modules] == []


@every_model
def test_outputs_agree_with_eager(entry: Entry):
    call = entry.call()
    expected, _ = eager(call)
    graphs = Graphs()
    compiled = torch.compile(call.module, backend=graphs)

    with ops.record_stats() as records:
        actual = call.run(compiled)

    assert [record.site for record in records] == [s.name for sites in graphs.sites for s in sites if s.rewritten]
    assert all(record.ran == "sparse" and bool((record.density == 1).all()) for record in records)
    assert relative_l1(actual, expected) < 0.03
    graphs.stop_quantizing()  # a wrong mask, scale or head would show however small its effect
    assert relative_l1(call.run(compiled), expected) < 1e-4


@every_model
def test_outputs_depend_on_attention(entry: Entry):
    """Else agreement with eager would say nothing: attention that is wrong must move them."""
    call = entry.call()
    expected, watch = eager(call)

    assert relative_l1(eager(call, uniform)[0], expected) > 0.05
    if any(c.masked or c.is_causal for c in watch.calls):
        assert relative_l1(eager(call, unmasked)[0], expected) > 0.05


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
    call = BY_NAME[name].call()
    expected, _ = eager(call)
    options = {"sparge.topk": 1.0, "sparge.min_tokens": 0}

    actual = call.run(torch.compile(call.module, backend="sparge", options=options))

    check_sites(sparge.last_report().sites, BY_NAME[name].found)
    assert relative_l1(actual, expected) < 0.03
