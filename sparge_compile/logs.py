"""What the compiler says while it compiles, under one logger: `sparge_compile`.

Nothing is shown by default and no handler is installed. `TORCH_LOGS="sparge_compile"` shows one line per graph (INFO),
`TORCH_LOGS="+sparge_compile"` one per attention call too (DEBUG), and the diffs of graph_diff.py, a logger below this
one: `TORCH_LOGS="+sparge_compile,-sparge_compile.graph_diff"` leaves them out. Python's `logging` does the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sparge_compile import dynamo
from sparge_compile.report import SiteReport

log = logging.getLogger("sparge_compile")


def graph_name() -> str:
    """The graph being compiled, by the function it was traced from."""
    code = dynamo.code_being_compiled()
    return "graph" if code is None else f"graph of {code.co_name} ({code.co_filename}:{code.co_firstlineno})"


def log_graph(reports: Sequence[SiteReport], seconds: float) -> None:
    """One graph was looked through and rewritten: how many of its calls, in how long, and each call."""
    rewritten = sum(report.rewritten for report in reports)
    facts = rewritten, len(reports), 1e3 * seconds, graph_name()
    log.info("%d of %d attention calls rewritten in %.1f ms, %s", *facts)
    for report in reports:
        decision = (
            f"rewritten, thresholds by {report.threshold_source}" if report.rewritten else f"dense, {report.reason}"
        )
        log.debug("%s (%s): %s", report.name, report.source, decision)
