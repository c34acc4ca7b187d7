"""Graphs before and after the rewrite, as a unified diff; logged under this module's name at DEBUG.

`TORCH_LOGS="+sparge_compile.graph_diff"` shows them, and so does logging.getLogger("sparge_compile.graph_diff").
"""

from __future__ import annotations

import difflib
import logging

from torch import fx

from sparge_compile import dynamo

log = logging.getLogger(__name__)


def is_wanted() -> bool:
    """Does anybody listen? Writing graphs down costs time."""
    return log.isEnabledFor(logging.DEBUG)


def readable(gm: fx.GraphModule) -> str:
    """The graph as Python, with the shape of every tensor and the line of user code that each part is from."""
    return gm.print_readable(print_output=False)


def difference(before: str, after: str) -> str:
    """A unified diff of two texts of `readable` of the graph being compiled; empty if they are equal."""
    code = dynamo.code_being_compiled()
    graph = "graph" if code is None else f"graph of {code.co_name} ({code.co_filename}:{code.co_firstlineno})"
    names = f"{graph}, before", f"{graph}, after"
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm=""))


def log_difference(before: str, after: str) -> None:
    """Logs what was changed in one graph."""
    log.debug("%s", difference(before, after) or "nothing changed in this graph")
