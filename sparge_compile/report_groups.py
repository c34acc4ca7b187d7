"""Repeated layers as one row: `blocks.{0-27}.attn1` for sites that a table shows alike but for a number in a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from sparge_compile.report import SiteReport

# A number that is a whole part of a name: of a layer, or of a call in its module (`attn:1`).
_NUMBER = re.compile(r"(?:(?<=^)|(?<=[.:]))(\d+)(?=[.:]|$)")

_Name = tuple[str | frozenset[int], ...]
"""A name in parts: texts, and the numbers that may stand between them."""


@dataclass(frozen=True)
class Group:
    """Sites that are alike, and the name that stands for all of theirs."""

    name: str
    sites: tuple[SiteReport, ...]

    @property
    def label(self) -> str:
        """The name, and how many there are."""
        return self.name if len(self.sites) == 1 else f"{self.name} x{len(self.sites)}"


def grouped(sites: Iterable[SiteReport], facts: Callable[[SiteReport], Hashable]) -> list[Group]:
    """Sites of equal facts whose names fill a pattern, in the order of the first of each group.

    A name stands for every combination of its numbers, and for no site that is not there.
    """
    groups: dict[tuple[Hashable, _Name], list[SiteReport]] = {}
    for site in sites:
        groups.setdefault((facts(site), _parts(site.name)), []).append(site)
    longest = max((len(name) for _, name in groups), default=0)
    for position in reversed(range(1, longest, 2)):
        merged: dict[tuple[Hashable, _Name], list[SiteReport]] = {}
        numbers: dict[tuple[Hashable, _Name], frozenset[int]] = {}
        for (fact, name), members in groups.items():
            here = name[position] if position < len(name) else frozenset[int]()
            assert isinstance(here, frozenset)
            key = fact, (*name[:position], frozenset[int](), *name[position + 1 :]) if here else name
            merged.setdefault(key, []).extend(members)
            numbers[key] = numbers.get(key, frozenset()) | here
        groups = {
            (fact, (*name[:position], numbers[fact, name], *name[position + 1 :]) if numbers[fact, name] else name): own
            for (fact, name), own in merged.items()
        }
    return [Group("".join(map(_shown, name)), tuple(members)) for (_, name), members in groups.items()]


def _parts(name: str) -> _Name:
    """Texts at even places, numbers at odd ones."""
    return tuple(frozenset({int(part)}) if place % 2 else part for place, part in enumerate(_NUMBER.split(name)))


def _shown(part: str | frozenset[int]) -> str:
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return str(next(iter(part)))
    return "{" + ",".join(_spans(sorted(part))) + "}"


def _spans(numbers: Sequence[int]) -> list[str]:
    """`0-3` for numbers in a row."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return [str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans]
