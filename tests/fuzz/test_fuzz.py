"""Random attention-like programs: the compiled one gives what the eager one gives, or its calls stayed dense.

`--fuzz-examples N` runs more of them than a few hundred.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from programs import Program, function_of, inputs_of, programs
from torch import Tensor, fx

from sparge_compile import Policy, SiteReport
from sparge_compile.backend import transform

EXACT = Policy(min_tokens=0, precision="none", cdf_threshold=1.0, similarity_threshold=1.0, pv_threshold=-1e30)
EXACT_TOLERANCE, ROUNDED_TOLERANCE = (1e-3, 1e-4), (5e-2, 5e-2)


def eager(program: Program) -> tuple[Tensor, ...]:
    """What the program returns, and its inputs afterwards. A program that torch itself does not run is left out."""
    parts = inputs_of(program).parts
    try:
        result = function_of(program)(*parts)
    except (RuntimeError, ValueError, IndexError):
        assume(False)
    return (*_flat(result), *parts)


def compiled(program: Program) -> tuple[tuple[Tensor, ...], list[SiteReport]]:
    parts, sites = inputs_of(program).parts, []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        sites.extend(transform(gm, EXACT))
        return gm.forward

    torch._dynamo.reset()
    dynamic = True if program.dynamic else None
    result = torch.compile(function_of(program), backend=backend, dynamic=dynamic, fullgraph=True)(*parts)
    return (*_flat(result), *parts), sites


def _flat(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check(program: Program, seen: Counter[str]) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = eager(program)
        actual, sites = compiled(program)
    rewritten = any(site.rewritten for site in sites)
    seen["rewritten" if rewritten else "refused" if sites else "not found"] += 1
    seen.update(site.reason for site in sites if site.reason)
    # In bf16 eager rounds its scores and weights to 8 bits of mantissa, and the kernel does not.
    rounds = "bfloat16" in (program.dtype, *program.before)
    rtol, atol = (ROUNDED_TOLERANCE if rounds else EXACT_TOLERANCE) if rewritten else (0.0, 0.0)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.timeout(7200)  # for thousands of them
def test_random_programs_give_what_eager_gives(pytestconfig: pytest.Config):
    seen: Counter[str] = Counter()
    examples = pytestconfig.getoption("--fuzz-examples")

    @settings(
        max_examples=examples,
        derandomize=examples == 300,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs)
    def run(program: Program) -> None:
        check(program, seen)

    run()
    print(seen)
    # Else the programs would say nothing of what is rewritten, or of what must not be.
    assert seen["rewritten"] > examples / 10 and seen["refused"] > examples / 10
