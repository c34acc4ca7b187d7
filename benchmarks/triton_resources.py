"""Compiles every variant of the Triton kernels for every supported GPU, without a GPU, and checks what comes out.

python benchmarks/triton_resources.py            print the tables, and what is wrong
python benchmarks/triton_resources.py --write    and put them into results/triton_resources.md
python benchmarks/triton_resources.py --check    and compare with that file, if it is of the same Triton
python benchmarks/triton_resources.py --core     only the variants that CI compiles
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from cross_compile import TARGETS, compiling_for
from triton_checks import faults
from triton_tables import Row, drift, read, write
from triton_variants import VARIANTS, call

RESULTS = Path(__file__).parent / "results" / "triton_resources.md"


def compile_target(target: str, variants: Sequence[str]) -> list[Row]:
    """All kernels of the variants for one target; a kernel that several launch belongs to the first."""
    rows: list[Row] = []
    met: set[str] = set()
    for name in variants:
        with compiling_for(TARGETS[target]) as compiled:
            call(VARIANTS[name])
        rows += [Row(name, kernel) for kernel in compiled if kernel.error is not None or kernel.key not in met]
        met.update(kernel.key for kernel in compiled)
    return rows


def compile_all(targets: Sequence[str], variants: Sequence[str], processes: int) -> list[Row]:
    """A process for each target, `processes` at a time."""
    context = multiprocessing.get_context("spawn")  # LLVM does not survive a fork in the middle of its work
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        done = pool.map(compile_target, targets, [variants] * len(targets))
        return [row for rows in done for row in rows]


def failures(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.kernel.target}, {row.kernel.kernel}, {row.variant}: {fault}"
        for row in rows
        for fault in faults(row.kernel, VARIANTS[row.variant])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--core", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the faults by target, and nothing else")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.write and (options.core or options.targets != list(TARGETS)):
        parser.error("--write is for all variants and all targets")
    variants = [name for name, variant in VARIANTS.items() if variant.core or not options.core]
    rows = compile_all(options.targets, variants, options.processes)
    found = failures(rows)
    if options.check:
        committed = read(RESULTS.read_text())
        if committed.triton == triton.__version__:
            found += drift(rows, committed)
        else:
            print(f"{RESULTS.name} is of Triton {committed.triton}, this is {triton.__version__}: not compared")
    if options.json:
        print(json.dumps({"kernels": len(rows), "faults": found}))
        return 0
    text = write(rows, found)
    print(text)
    if options.write:
        RESULTS.write_text(text)
    print(*found, f"{len(rows)} kernels, {len(found)} faults", sep="\n", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
