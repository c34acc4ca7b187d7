"""What `python -m sparge_compile bench` found: rows, verdicts, words and an exit status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sparge_compile.bench import verdict
from sparge_compile.bench.inputs import layout_doubt
from sparge_compile.bench.problem import DTYPES
from sparge_compile.bench.rows import Row
from sparge_compile.bench.verdict import Verdict
from sparge_compile.command.bench_options import STATUS

SMOOTH = (
    "Measured on a synthetic smooth field. How many tiles may be skipped depends on the numbers: "
    "--inputs FILE measures your own q, k and v."
)
INTERRUPTED = "Interrupted: this is what was measured until then."


@dataclass(frozen=True)
class Measured:
    """One size. call: `Problem.facts`; None where not even the problem could be made."""

    rows: list[Row]
    verdict: Verdict
    call: dict[str, Any] | None


@dataclass
class Result:
    """What was measured, and what it means.

    facts: of the machine. sizes: from the shortest. notes: what else is to be said of the machine. unavailable: why
    there is no kernel to measure.
    """

    facts: dict[str, str]
    settings: dict[str, Any]
    device: torch.device | None
    sizes: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unavailable: str | None = None
    interrupted: bool = False

    @property
    def rows(self) -> list[Row]:
        return [row for size in self.sizes for row in size.rows]

    @property
    def verdicts(self) -> list[Verdict]:
        return [size.verdict for size in self.sizes]

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What the calls were, size by size."""
        return [size.call for size in self.sizes if size.call is not None]

    @property
    def code(self) -> int:
        """The exit status, one of `STATUS`."""
        if self.interrupted:
            return 130
        if self.unavailable or any(one.outcome in ("gate failed", "failed") for one in self.verdicts):
            return 1
        return 0 if any(one.ratio is not None for one in self.verdicts) else 3

    @property
    def words(self) -> list[str]:
        """The lines after the table."""
        if self.unavailable:
            return self.unavailable.splitlines()
        words = [one.words for one in self.verdicts]
        if len(self.verdicts) > 1:
            words.append(verdict.break_even(self.verdicts))
        if self.device is not None and self.calls:
            first = self.calls[0]
            words.append(verdict.default_minimum(self.device, DTYPES[first["dtype"]], first["precision"]))
            words += [SMOOTH] if self.settings["inputs"] is None else [layout_doubt(*first["q"][1:3]) or ""]
        words += [*self.notes, INTERRUPTED if self.interrupted else ""]
        return [line for line in words if line]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": 1,
            "machine": self.facts,
            "settings": self.settings,
            "calls": self.calls,
            "rows": [asdict(row) for row in self.rows],
            "verdicts": [asdict(one) for one in self.verdicts],
            "words": self.words,
            "exit_code": self.code,
            "exit_meaning": STATUS[self.code],
        }


def in_words(calls: Sequence[Mapping[str, Any]], source: str | None) -> str:
    """What was measured, as one line; the calls differ in their tokens only. source: the user's file."""
    first = calls[0]
    names: dict[str, list[str]] = {}  # by shape
    for name in "qkv":
        sizes = [str(size) for size in first[name]]
        sizes[2] = sizes[2] if len(calls) == 1 else "tokens"
        names.setdefault(f"[{', '.join(sizes)}]", []).append(name)
    shapes = ", ".join(f"{_listed(same)} {shape}" for shape, same in names.items())
    causal = "causal" if first["is_causal"] else "not causal"
    origin = "smooth field" if source is None else source
    return f"{origin}, {shapes}, {first['dtype']}, {causal}, precision {first['precision']}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
