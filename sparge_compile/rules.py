"""The defaults, in one place: from what length on to be sparse, and the thresholds where nobody named any.

The rows of "clusters" were set so that, on every workload of tests/workloads, the relative L1 against dense attention
stays below 0.05, every row's cosine above 0.95, and every needle is found: tests/test_default_policy.py, INT8 included,
and benchmarks/results/predictors.md at 4096 and 8192 tokens. One setting serves these lengths, head_dim 64 and 128, and
cross-attention, so no row asks for them: of text, whose keys are unlike each other, theta keeps every tile, and uniform
random inputs are computed whole for the same reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparge_kernels import ops
from sparge_kernels.thresholds import Thresholds

# Fewest queries and keys at which sparse attention beats dense attention, with a margin for small heads and densities
# near 1: benchmarks/results/cpu_breakeven.md. CPUs go by ops.int8_products; without them, by choice or for want of the
# instructions, it takes skipped tiles to gain. No GPU was measured yet: 8192 is an assumption on the safe side.
BREAK_EVEN = {"AVX-512 VNNI": 1024, "AVX2": 2048, "cpu": 8192, "cuda": 8192}


@dataclass(frozen=True)
class Rule:
    """Thresholds for the calls it fits; `name` stands for it in reports. is_causal None: either."""

    name: str
    predictor: str
    thresholds: Thresholds
    is_causal: bool | None = None

    def fits(self, predictor: str, is_causal: bool) -> bool:
        """Is this the rule of such a call? `predictor` may be "auto"."""
        return predictor in ("auto", self.predictor) and self.is_causal in (None, is_causal)


# Tried from the top. Flat attention over many tokens decides the first row: its output is a mean of many values, so a
# small share of the mass is a larger share of it. Causal maps are more peaked, and the share is one of the mass before
# the query tile only: the tile itself is always computed and not counted (clusters.py).
# The paper's row keeps .98 of the proxy mass, as its authors' code does; it loses needles (predictors.md).
RULES = (
    Rule("full", "clusters", Thresholds(topk=None, cdf=0.96, similarity=0.15, pv=None), is_causal=False),
    Rule("causal", "clusters", Thresholds(topk=None, cdf=0.92, similarity=0.15, pv=None), is_causal=True),
    Rule("paper", "sparge", Thresholds(topk=None, cdf=0.98, similarity=0.5, pv=None)),
)


def rule_for(predictor: str, is_causal: bool) -> Rule:
    """The rule of a call under `Policy.predictor`."""
    return next(rule for rule in RULES if rule.fits(predictor, is_causal))


def break_even(device: torch.device, precision: str, has_bias: bool = False) -> int:
    """The default `min_tokens` of calls on a device, in tokens. has_bias: of those with a mask of floats."""
    products = None if precision == "none" else ops.int8_products(device)
    if has_bias and products == "AVX2":
        products = None  # tiles that a bias covers are computed in fp32, and lose: results/masks.md
    return BREAK_EVEN[products or device.type]
