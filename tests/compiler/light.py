"""A backend without Inductor, which runs the rewritten graph as it is, and inputs and models that tests share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparge_compile import Policy, SiteReport
from sparge_compile.backend import transform

# Every tile is computed, unquantized: what the operator returns is dense attention up to fp32 rounding.
EXACT_FIELDS: dict[str, Any] = {
    "min_tokens": 0,
    "precision": "none",
    "cdf_threshold": 1.0,
    "similarity_threshold": 1.0,
    "pv_threshold": -1e30,
}
EXACT = Policy(**EXACT_FIELDS)
EXACT_OPTIONS = {f"sparge.{name}": value for name, value in EXACT_FIELDS.items()}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class LightBackend:
    """Rewrites each graph and runs it eagerly; keeps the nodes before, the graphs after, and the reports."""

    def __init__(self, policy: Policy = EXACT) -> None:
        self.policy = policy
        self.before: list[list[str]] = []
        self.graphs: list[fx.GraphModule] = []
        self.sites: list[SiteReport] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.before.append(lines(gm.graph))
        self.sites.extend(transform(gm, self.policy))
        self.graphs.append(gm)
        return gm.forward

    @property
    def compiles(self) -> int:
        return len(self.graphs)

    @property
    def rewritten(self) -> list[bool]:
        return [site.rewritten for site in self.sites]

    @property
    def reason(self) -> str:
        """The reason of the only site."""
        (site,) = self.sites
        return site.reason or ""

    def operators(self) -> list[fx.Node]:
        return nodes_of(self.graphs, torch.ops.sparge.attention.default)


def lines(graph: fx.Graph) -> list[str]:
    """Each node of a graph as text: operation, target, arguments."""
    return [node.format_node() or f"{node.op} {node.name} {node.args}" for node in graph.nodes]


def nodes_of(graphs: Sequence[fx.GraphModule], target: Any) -> list[fx.Node]:
    return [node for gm in graphs for node in gm.graph.nodes if node.target == target]


def run(
    function: Callable[..., Any], *args: Any, policy: Policy = EXACT, grad: bool = False, **compile_options: Any
) -> tuple[Any, LightBackend]:
    """(what the compiled function returns, the backend that compiled it)."""
    backend = LightBackend(policy)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.compile(function, backend=backend, **compile_options)(*args), backend


def stays_dense(function: Callable[..., Any], *args: Any, reason: str = "", **compile_options: Any) -> LightBackend:
    """Compiles and runs: every site dense, the result that of the eager function to the bit. Returns the backend."""
    with torch.no_grad():
        expected = function(*args)
    out, backend = run(function, *args, **compile_options)
    assert backend.sites and not any(backend.rewritten)
    assert reason in " ".join(site.reason for site in backend.sites)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    return backend


def is_rewritten(
    function: Callable[..., Any], *args: Any, tolerance: dict[str, float] = CLOSE, **compile_options: Any
) -> LightBackend:
    """Compiles and runs: every site rewritten, shape, dtype and strides those of eager, numbers close."""
    with torch.no_grad():
        expected = function(*args)
    out, backend = run(function, *args, **compile_options)
    assert backend.sites and all(backend.rewritten), [site.reason for site in backend.sites]
    torch.testing.assert_close(out, expected, check_stride=out.numel() > 0, **tolerance)
    return backend


def qkv(
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    tokens: int = 12,
    keys: int | None = None,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads, tokens, dim, dtype=dtype)
    shape = (batch, kv_heads or heads, keys or tokens, dim)
    return q, torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


class Attention(nn.Module):
    """Self-attention over x [B, S, 16] with two heads; the output projection relies on SDPA's strides."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, **self.arguments)
        return out.transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Blocks of attention, named blocks.0, blocks.1, ..."""

    def __init__(self, depth: int = 2, **arguments: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(**arguments) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x
