"""Attention inputs with the structure of real ones: what thresholds are chosen on, tested on and timed on.

Random tensors have nothing to predict. Each workload is a function of its size and a seed; `catalogue` names all that
the default policy must serve. benchmarks/predictors.py compares predictors on them.
"""

from __future__ import annotations

from sparge_compile.bench.field import smooth_field
from workloads.catalogue import WORKLOADS, Needle, Workload

__all__ = ["WORKLOADS", "Needle", "Workload", "smooth_field"]
