"""What the doctor finds: facts, things to know, and problems, each of which says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]
REPORT = "please report it with the output of `python -m sparge_compile doctor`"


@dataclass(frozen=True)
class Finding:
    """One line. level: "note" is worth knowing, "problem" is wrong; advice: what to do about it."""

    name: str
    value: str
    level: Level = "ok"
    advice: str = ""


@dataclass
class Section:
    title: str
    findings: list[Finding] = field(default_factory=list)


def problem(name: str, value: str, advice: str) -> Finding:
    return Finding(name, value, "problem", advice)


def note(name: str, value: str, advice: str = "") -> Finding:
    return Finding(name, value, "note", advice)


def from_reason(name: str, reason: str, level: Level = "problem", otherwise: str = REPORT) -> Finding:
    """Of a reason whose first sentence says what is wrong and whose others say what to do, else `otherwise`."""
    what, _, do = reason.partition(". ")
    return Finding(name, what.rstrip("."), level, do or otherwise)


def examine(title: str, look: Callable[[], Iterable[Finding]]) -> Section:
    """What `look` finds. If it fails, what it found until then, and that as a problem: a broken machine breaks it."""
    section = Section(title)
    try:
        for finding in look():
            section.findings.append(finding)
    except Exception as error:  # whatever a broken machine raises
        words = " ".join(str(error).split())[:300]
        section.findings.append(problem(title, f"cannot be examined ({type(error).__name__}: {words})", REPORT))
    return section


@dataclass(frozen=True)
class Diagnosis:
    """All sections. code: the exit status, 1 if there is a problem."""

    sections: tuple[Section, ...]

    @property
    def problems(self) -> list[Finding]:
        """Those of all sections; what several find, with the same words, once."""
        found = [one for section in self.sections for one in section.findings if one.level == "problem"]
        return list({one.value: one for one in reversed(found)}.values())[::-1]

    @property
    def code(self) -> int:
        return int(bool(self.problems))

    def to_json(self) -> dict[str, Any]:
        return {
            "version": 1,
            "ok": not self.problems,
            "sections": [asdict(section) for section in self.sections],
            "problems": [{"what": f"{one.name}: {one.value}", "do": one.advice} for one in self.problems],
            "exit_code": self.code,
        }
