"""What the compiler says while it compiles, under one logger: `sparge_compile`.

Nothing is shown by default and no handler is installed: `TORCH_LOGS="sparge_compile"` shows one line per graph (INFO),
`TORCH_LOGS="+sparge_compile"` one per attention call too (DEBUG), and so does Python's `logging`. Graphs before and
after are a logger of their own, graph_diff.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sparge_compile.report import SiteReport

log = logging.getLogger("sparge_compile")


def log_graph(reports: Sequence[SiteReport], seconds: float) -> None:
    """One graph was looked through and rewritten: how many of its calls, in how long, and each call."""
    rewritten = sum(report.rewritten for report in reports)
    log.info("%d of %d attention calls rewritten in %.1f ms", rewritten, len(reports), 1e3 * seconds)
    for report in reports:
        decision = (
            f"rewritten, thresholds by {report.threshold_source}" if report.rewritten else f"dense, {report.reason}"
        )
        log.debug("%s (%s): %s", report.name, report.source, decision)
