"""What the benchmark needs to know of a kind of device, beside the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparge_compile.bench.accuracy import Check
from sparge_compile.bench.exact import Expected
from sparge_compile.bench.peers import Call, Peer
from sparge_compile.bench.problem import Problem
from sparge_compile.bench.timing import Stopwatch

if TYPE_CHECKING:
    import argparse

    from sparge_compile.bench.gpu_roofline import Ceilings
    from sparge_compile.bench.rows import Row
    from sparge_compile.bench.table import Column


def no_stages(problem: Problem) -> Mapping[str, Callable[[], object]]:
    return {}


def no_judgement(row: Row, problem: Problem) -> None:
    pass


@dataclass(frozen=True)
class Target:
    """A device, how calls are checked and timed on it, and what is printed around the rows.

    defaults: of the options in options.py. one_block: all densities are timed in one block, with the dense peers once.
    facts: of the machine, by the number of threads; facts_after: those that change. closing: lines after the table, and
    what belongs into JSON, from the options and all rows. ceilings: what the device reaches in an input dtype; measured
    once, before all else.

    expected: what outputs are compared with. checked_tiles: adds to a check what is known of the tiles to compute.
    stages: parts of the project's call. extra_bytes: a call's peak memory beyond inputs and output; None where that is
    not known. input_bytes: what that is a share of. judge: fills in what the ceilings make of a timed row.
    """

    device: torch.device
    peers: Mapping[str, Peer]
    defaults: Mapping[str, Any]
    columns: Sequence[Column]
    legend: str
    facts: Callable[[int], dict[str, str]]
    stopwatch: Callable[[Callable[[], object]], Stopwatch]
    expected: Callable[[Problem], Expected]
    extra_bytes: Callable[[Problem, Call], int | None]
    input_bytes: Callable[[Problem], int]
    checked_tiles: Callable[[Check], Check] = lambda check: check
    stages: Callable[[Problem], Mapping[str, Callable[[], object]]] = no_stages
    judge: Callable[[Row, Problem], None] = no_judgement
    ceilings: Callable[[torch.dtype], Ceilings] | None = None
    closing: Callable[[argparse.Namespace, Sequence[Row]], tuple[list[str], dict[str, Any]]] = lambda *_: ([], {})
    facts_after: Callable[[], dict[str, str]] = dict
    warm_up: int = 0
    one_block: bool = False
