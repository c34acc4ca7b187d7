"""The speeds of one run as a picture, from its JSON: python -m sparge_compile.bench.plot FILE.json FILE.png"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparge_compile.bench.peers import DENSE
from sparge_compile.bench.problem import ONE_TILE


def draw(content: Mapping[str, Any], path: Path) -> None:
    """One panel for each head dim, causal or not: speed over the best dense peer by tokens, a colour for each choice.

    content: what the benchmarks write as JSON. The ending of `path` says the format.
    """
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if row["ratio"] is not None and row["choice"] != ONE_TILE.name]
    kinds = sorted({(row["head_dim"], row["is_causal"]) for row in rows})
    figure = Figure(figsize=(5.5 * max(len(kinds), 1), 4.5), layout="constrained")
    for panel, (head_dim, is_causal) in enumerate(kinds, start=1):
        axes = figure.add_subplot(1, len(kinds), panel)
        some = [row for row in rows if (row["head_dim"], row["is_causal"]) == (head_dim, is_causal)]
        for label, style, line in curves(some):
            axes.plot([row["tokens"] for row in line], [row["ratio"] for row in line], label=label, **style)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.set_title(f"head dim {head_dim}, {'causal' if is_causal else 'not causal'}")
        axes.set_xlabel("tokens")
        axes.set_ylabel("times as fast as the best dense peer")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    machine = content["machine"]
    figure.suptitle(f"{machine.get('GPU', machine.get('CPU'))}, torch {machine['torch']}, {machine['date']}")
    figure.savefig(path, dpi=150)


def curves(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any], list[Mapping[str, Any]]]]:
    """Label, style and rows by tokens of each sparse variant with each choice: the first variant's lines are solid."""
    sparse = [row for row in rows if not row["variant"].startswith(DENSE)]
    variants, choices = (list(dict.fromkeys(row[name] for row in sparse)) for name in ("variant", "choice"))
    found = []
    for variant in variants:
        for at, choice in enumerate(choices):
            line = [row for row in sparse if (row["variant"], row["choice"]) == (variant, choice)]
            style = {"color": f"C{at}", "marker": "o", "linestyle": "-" if variant == variants[0] else "--"}
            found.append((f"{variant}, {choice}", style, sorted(line, key=lambda row: row["tokens"])))
    return [curve for curve in found if curve[2]]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
