"""`assert_rewritten`: exactly so many attention calls of a model run sparsely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparge_compile.explain import explain
from sparge_compile.policy import Policy
from sparge_compile.report import Report


def assert_rewritten(
    model: Callable[..., Any], count: int, *args: Any, policy: Policy | None = None, **kwargs: Any
) -> Report:
    """Runs the model once, as `sparge.explain` does, and asserts that exactly `count` attention calls are rewritten.

    A place in the source that runs several times in one module is one call. If it ran both ways, sparse and dense, the
    report lists it twice, and one of the two counts.

    Args:
        model: a module or function, compiled or not.
        count: how many attention calls run sparsely. 0 asserts that the model stays dense.
        *args, **kwargs: what to call it with; as long as in real use, or with a policy of a small `min_tokens`: short
            calls stay dense.
        policy: None is the one in force, on top of the options of a compiled model.

    Returns:
        The report, for further assertions: names, densities, thresholds.

    Raises:
        AssertionError: another number; its text has the report and the reason of every call that stayed dense.
        Whatever `explain` or the model raises.
    """
    report = explain(model, *args, policy=policy, timing=False, **kwargs)
    if len(report.rewritten) != count:
        expected = f"expected {count} attention {'call' if count == 1 else 'calls'} to be rewritten"
        raise AssertionError(f"{expected}, {len(report.rewritten)} of {len(report.sites)} were.\n{report}")
    return report
