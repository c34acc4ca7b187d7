"""The tables of results/triton_resources.md: written, read back, and compared with what is compiled now."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import triton
from cross_compile import KILOBYTE, TARGETS, Compiled
from triton_checks import REGISTER_DRIFT, SPARSE_LOOP

_HEAD = """# What the Triton kernels take of each GPU

`python benchmarks/triton_resources.py --write`, Triton {version}; compiled on a machine without a GPU.

Registers of a thread / KB of shared memory of a program; `!`: bytes of registers spilled to memory. On gfx942 registers
are vector and accumulation registers together, and shared memory is the LDS. A kernel that several variants launch
stands at the first of them; `.`: there it is another variant's. Names: dtype, head_dim, what differs from the default
call (INT8, stage 2, no mask, head_dim and value dim alike).
"""


@dataclass(frozen=True)
class Row:
    """A kernel and the variant that launches it first."""

    variant: str
    kernel: Compiled


@dataclass(frozen=True)
class Committed:
    """The file as read back: registers and spills by (kernel, variant, target)."""

    triton: str
    cells: dict[tuple[str, str, str], tuple[int, int]]


def write(rows: Sequence[Row], faults: Sequence[str]) -> str:
    loops = [row for row in rows if row.kernel.kernel == SPARSE_LOOP]
    others = [row for row in rows if row.kernel.kernel != SPARSE_LOOP]
    parts = [
        _HEAD.format(version=triton.__version__),
        "## The sparse loop: registers and shared memory\n\n" + _table(loops, _resources),
        "## The sparse loop: warps and pipeline stages\n\n" + _table(loops, _launch),
        "## The sparse loop: matrix instructions\n\n" + _table(loops, _instructions),
        "## The other kernels: registers and shared memory\n\n" + _table(others, _resources),
        "## Faults\n\n" + ("".join(f"- {fault}\n" for fault in faults) or "None.\n"),
    ]
    return "\n".join(parts)


def _table(rows: Sequence[Row], cell: Callable[[Compiled], str]) -> str:
    targets = [target for target in TARGETS if any(row.kernel.target == target for row in rows)]
    by_name: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        line = by_name.setdefault((row.kernel.kernel, row.variant), {})
        line.setdefault(row.kernel.target, []).append(cell(row.kernel))
    lines = [["kernel", "variant", *targets], ["---"] * (2 + len(targets))]
    lines += [[*name, *(", ".join(line.get(t, ["."])) for t in targets)] for name, line in by_name.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _resources(kernel: Compiled) -> str:
    if kernel.error is not None:
        return "error"
    spills = f" !{kernel.spills}" if kernel.spills else ""
    return f"{kernel.registers} / {kernel.shared / KILOBYTE:.1f}{spills}"


def _launch(kernel: Compiled) -> str:
    return f"{kernel.warps} / {kernel.stages}"


def _instructions(kernel: Compiled) -> str:
    return ", ".join(f"{count} {name}" for name, count in kernel.instructions)


def read(text: str) -> Committed:
    """What `write` wrote."""
    version = re.search(r"Triton ([\w.+]+);", text)
    if version is None:
        raise ValueError("the file names no Triton version; write it with --write")
    cells: dict[tuple[str, str, str], tuple[int, int]] = {}
    for section in text.split("\n## "):
        if "registers and shared memory\n" not in section:
            continue
        head, _, *lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
        for kernel, variant, *numbers in lines:
            for target, number in zip(head[2:], numbers, strict=True):
                found = re.fullmatch(r"(\d+) / [\d.]+(?: !(\d+))?", number)
                if found is not None:
                    cells[kernel, variant, target] = int(found[1]), int(found[2] or 0)
    return Committed(version[1], cells)


def drift(rows: Sequence[Row], committed: Committed) -> list[str]:
    """What differs from the committed file by more than compilers' noise."""
    found = []
    for row in rows:
        kernel, where = row.kernel, (row.kernel.kernel, row.variant, row.kernel.target)
        if kernel.error is not None:
            continue
        # A kernel of several variants stands at the first of all; among fewer variants that may be another.
        cells = [cell for (name, _, target), cell in committed.cells.items() if (name, target) == where[::2]]
        cells = [committed.cells[where]] if where in committed.cells else cells
        if not any(_close(kernel, *cell) for cell in cells):
            found.append(
                f"{', '.join(where)}: {kernel.registers} registers and {kernel.spills} bytes spilled, the committed "
                f"table has {cells[0] if len(cells) == 1 else 'no such kernel'}; if that is meant, run with --write"
            )
    return found


def _close(kernel: Compiled, registers: int, spills: int) -> bool:
    return abs(kernel.registers - registers) <= REGISTER_DRIFT and kernel.spills <= spills
