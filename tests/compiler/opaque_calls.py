"""Comparing models whose attention is one opaque call, with and without rewriting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from light import CLOSE, LightBackend, lines, run

from sparge_compile import Policy

OFF = Policy(enabled=False)


def same_as_dense(function: Callable[..., Any], *args: Any, count: int = 1, **options: Any) -> LightBackend:
    """Compiles and runs: `count` sites, all rewritten; shape, dtype, strides and numbers are the dense compile's.

    With rewriting off every node stays as it was. The reference is not eager: eager takes other paths than a compile
    does, with other strides (seen, 2.11).
    """
    tolerance = options.pop("tolerance", CLOSE)
    torch._dynamo.reset()
    expected, dense = run(function, *args, policy=OFF, **options)
    assert dense.before == [lines(gm.graph) for gm in dense.graphs] and not any(dense.rewritten)
    torch._dynamo.reset()
    out, backend = run(function, *args, **options)
    assert len(backend.sites) == count and all(backend.rewritten), [site.reason for site in backend.sites]
    assert len(backend.operators()) == count
    torch.testing.assert_close(out, expected, check_stride=True, equal_nan=True, **tolerance)
    return backend


def stays_as_compiled(function: Callable[..., Any], *args: Any, **options: Any) -> LightBackend:
    """Compiles and runs: every site dense, every node as it was, the result that of the dense compile to the bit."""
    torch._dynamo.reset()
    expected, _ = run(function, *args, policy=OFF, **options)
    torch._dynamo.reset()
    out, backend = run(function, *args, **options)
    assert backend.sites and not any(backend.rewritten)
    assert backend.before == [lines(gm.graph) for gm in backend.graphs]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    return backend
