"""What `explain` finds in every model of the zoo, as the table of docs/coverage.md.

python tests/models/coverage_table.py            print it
python tests/models/coverage_table.py --write    and put it into docs/coverage.md
"""

from __future__ import annotations

import argparse
import datetime
import functools
import re
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

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
POLICY = sparge.Policy(topk=1.0, min_tokens=0)
LIBRARIES = ("torch", "transformers", "diffusers")

_HEAD = ("model", "class", "kind", "attention calls", "found", "rewritten", "masks", "patterns", "dense, and why")
_CAPTION_AND_TABLE = re.compile(r"(?<=<!-- table -->\n)(.*?)\n\n(.*?)\n(?=<!-- end -->)", re.DOTALL)


@functools.cache
def explained(entry: Entry) -> sparge.Report:
    """The report of the entry's one call."""
    torch._dynamo.reset()
    call, _, _ = observed(entry)
    call.empty_caches()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparge.explain(call.module, *call.args, policy=POLICY, **call.kwargs)


def table() -> str:
    """All kinds and entries, and the reasons in full below."""
    reasons: dict[str, str] = {}
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    lines += [_line(_row(kind, entry, reasons)) for kind, entries in KINDS.items() for entry in entries]
    lines.append(_line(_total()))
    lines += ["", *(f"- ({letter}) {reason}" for reason, letter in reasons.items())]
    return "\n".join(lines)


def caption() -> str:
    versions = ", ".join(f"{library} {_version(library)}" for library in LIBRARIES)
    return f"{datetime.date.today().isoformat()}, {versions}."


def committed_table() -> str:
    return _committed()[2]


def committed_versions() -> dict[str, str]:
    return dict(re.findall(r"(\w+) ([\w.]+\w)", _committed()[1]))


def installed_versions() -> dict[str, str]:
    return {library: _version(library) for library in LIBRARIES}


def mask(site: sparge.SiteReport) -> str:
    """`causal`, `given` or nothing."""
    return "causal" if site.is_causal else "given" if site.masked else ""


def _committed() -> re.Match[str]:
    found = _CAPTION_AND_TABLE.search(PAGE.read_text())
    assert found is not None, f"{PAGE} has lost a marker"
    return found


def _version(library: str) -> str:
    return version(library).split("+")[0]


def _row(kind: str, entry: Entry, reasons: dict[str, str]) -> Sequence[str]:
    """`reasons` maps each reason met so far to its letter."""
    report, (call, _, calls) = explained(entry), observed(entry)
    module = type(call.module)
    dense = Counter(site.reason or "" for site in report.dense)
    for reason in dense:
        reasons.setdefault(reason, chr(ord("a") + len(reasons)))
    why = ", ".join(f"{count} ({reasons[reason]})" for reason, count in dense.items())
    masks = Counter(mask(site) for site in report.rewritten if mask(site))
    shown_masks = ", ".join(f"{count} {name}" for name, count in masks.items())
    patterns = ", ".join(sorted({site.pattern for site in report.sites}))
    counts = (str(len(calls)), str(len(report.sites)), str(len(report.rewritten)))
    return (entry.name, _class(module), kind, *counts, shown_masks or "-", patterns or "-", why or "-")


def _class(module: type) -> str:
    library = module.__module__.split(".")[0]
    return f"`{'torch.nn' if library == 'torch' else library}.{module.__name__}`"


def _total() -> Sequence[str]:
    entries = [entry for kind in KINDS.values() for entry in kind]
    calls = sum(len(observed(entry)[2]) for entry in entries)
    found, rewritten = (sum(len(getattr(explained(e), kind)) for e in entries) for kind in ("sites", "rewritten"))
    return ("all", f"{len(entries)} calls", "", str(calls), str(found), str(rewritten), "", "", str(found - rewritten))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    print(caption() + "\n\n" + table())
    if options.write:
        written = f"{caption()}\n\n{table()}\n"
        PAGE.write_text(_CAPTION_AND_TABLE.sub(lambda _: written, PAGE.read_text(), count=1))


if __name__ == "__main__":
    main()
