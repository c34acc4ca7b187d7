"""What `explain` finds in every model of the zoo, as the table of docs/coverage.md.

python tests/models/coverage_table.py            print it
python tests/models/coverage_table.py --write    and put it into docs/coverage.md, and its sums into README.md
"""

from __future__ import annotations

import argparse
import datetime
import functools
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from zoo import KINDS
from zoo_entry import Entry
from zoo_watch import observed

import sparge_compile as sparge

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "coverage.md", ROOT / "README.md"
POLICY = sparge.Policy(topk=1.0, min_tokens=0)
LIBRARIES = ("torch", "transformers", "diffusers")

_HEAD = ("model", "class", "kind", "attention calls", "found", "rewritten", "masks", "patterns", "dense, and why")
_ENTRIES = [entry for entries in KINDS.values() for entry in entries]
_SUMMARY = re.compile(r"(?<=<!-- coverage -->\n)(.*?)\n(?=<!-- end -->)", re.DOTALL)
_CAPTION_AND_TABLE = re.compile(r"(?<=<!-- table -->\n)(.*?)\n\n(.*?)\n(?=<!-- end -->)", re.DOTALL)


@functools.cache
def explained(entry: Entry) -> sparge.Report:
    """The report of the entry's one call."""
    torch._dynamo.reset()
    call, _, _ = observed(entry)
    call.empty_caches()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparge.explain(call.module, *call.args, policy=POLICY, timing=False, **call.kwargs)


def table() -> str:
    """All kinds and entries, and the reasons in full below."""
    reasons: dict[str, str] = {}
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    lines += [_line(_row(kind, entry, reasons)) for kind, entries in KINDS.items() for entry in entries]
    lines.append(_line(_total()))
    lines += ["", *(f"- ({letter}) {reason}" for reason, letter in reasons.items())]
    return "\n".join(lines)


def summary() -> str:
    """The sums, in lines of README."""
    calls, found, rewritten = _sums()
    classes = len({type(observed(entry)[0].module) for entry in _ENTRIES})
    sentence = (
        f"In {classes} models of transformers, diffusers and `torch.nn`, small and in {len(_ENTRIES)} ways of calling "
        f"them, {found} of {calls} attention calls are found and {rewritten} rewritten: [each model's counts and "
        "reasons](docs/coverage.md)."
    )
    return "\n".join(textwrap.wrap(sentence, 120, break_long_words=False, break_on_hyphens=False))


def caption() -> str:
    versions = ", ".join(f"{library} {_version(library)}" for library in LIBRARIES)
    return f"{datetime.date.today().isoformat()}, {versions}."


def committed_table() -> str:
    return _found(_CAPTION_AND_TABLE, PAGE)[2]


def committed_summary() -> str:
    return _found(_SUMMARY, README)[1]


def committed_versions() -> dict[str, str]:
    return dict(re.findall(r"(\w+) ([\w.]+\w)", _found(_CAPTION_AND_TABLE, PAGE)[1]))


def installed_versions() -> dict[str, str]:
    return {library: _version(library) for library in LIBRARIES}


def mask(site: sparge.SiteReport) -> str:
    """`causal`, `given` or nothing."""
    return "causal" if site.is_causal else "given" if site.masked else ""


def _found(part: re.Pattern[str], page: Path) -> re.Match[str]:
    found = part.search(page.read_text())
    assert found is not None, f"{page} has lost a marker"
    return found


def _write(part: re.Pattern[str], page: Path, text: str) -> None:
    _found(part, page)
    page.write_text(part.sub(lambda _: f"{text}\n", page.read_text(), count=1))


def _version(library: str) -> str:
    return version(library).split("+")[0]


def _row(kind: str, entry: Entry, reasons: dict[str, str]) -> Sequence[str]:
    """`reasons` maps each reason met so far to its letter."""
    report, (call, _, calls) = explained(entry), observed(entry)
    module = type(call.module)
    dense = Counter(site.reason or "" for site in report.dense)
    for reason in dense:
        reasons.setdefault(reason, chr(ord("a") + len(reasons)))
    why = [f"{count} ({reasons[reason]})" for reason, count in dense.items()]
    masks = Counter(mask(site) for site in report.rewritten if mask(site))
    shown_masks = ", ".join(f"{count} {name}" for name, count in masks.items())
    patterns = ", ".join(sorted({site.pattern for site in report.sites}))
    counts = (str(len(calls)), str(len(report.sites)), str(len(report.rewritten)))
    return (entry.name, _class(module), kind, *counts, shown_masks or "-", patterns or "-", ", ".join(why) or "-")


def _class(module: type) -> str:
    library = module.__module__.split(".")[0]
    return f"`{'torch.nn' if library == 'torch' else library}.{module.__name__}`"


def _total() -> Sequence[str]:
    calls, found, rewritten = _sums()
    return ("all", "", "", str(calls), str(found), str(rewritten), "", "", str(found - rewritten))


def _sums() -> tuple[int, int, int]:
    """Attention calls, those found, and those rewritten."""
    calls = sum(len(observed(entry)[2]) for entry in _ENTRIES)
    reports = [explained(entry) for entry in _ENTRIES]
    return calls, sum(len(report.sites) for report in reports), sum(len(report.rewritten) for report in reports)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    text = f"{caption()}\n\n{table()}"
    print(text, summary(), sep="\n\n")
    if options.write:
        _write(_CAPTION_AND_TABLE, PAGE, text)
        _write(_SUMMARY, README, summary())


if __name__ == "__main__":
    main()
