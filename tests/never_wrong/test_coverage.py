"""README.md's table is what the markers say, and no kernel or entry is left out of an item it has a part in.

`python tests/never_wrong/test_coverage.py` writes the table.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ELSEWHERE = (
    "compiler/test_context.py",
    "compiler/test_functional.py",
    "kernels/test_triton_gpu.py",
    "test_default_policy.py",
)
ITEMS = {
    1: "Mask dropped",
    2: "Mask polarity and type",
    3: "Wrong scale",
    4: "Causal alignment",
    5: "Rows with nothing to attend to",
    6: "Ragged ends",
    7: "GQA and head mapping",
    8: "Dtype and range",
    9: "Layout",
    10: "Dropout, grad, training",
    11: "CUDA graphs",
    12: "In-place and aliasing",
    13: "Caches",
    14: "Everything else in the process",
    15: "Silent no-op",
    16: "Threads, tasks, exceptions",
    17: "Needle",
}
SPECIFICATION = {"reference", "reference-shared"}
KERNELS = {f"{kernel}-{entry}" for kernel in ("native", "triton", "gpu") for entry in ("direct", "compiled")}
BLOCKED = {"blocked-direct", "blocked-compiled"}
EVERY = SPECIFICATION | KERNELS | BLOCKED
# A row with nothing to attend to needs a mask. Items 10 to 16 are about what no kernel sees; 11 about GPUs.
NEEDED = dict.fromkeys((1, 2, 3, 4, 6, 7, 8, 9, 12, 17), EVERY) | {
    5: SPECIFICATION | KERNELS,
    10: {"direct", "compiled"},
    11: {"gpu-direct", "gpu-compiled"},
    13: {"compiled"},
    14: {"compiled"},
    15: {"direct", "compiled"},
    16: {"direct", "compiled"},
}


class Collected:
    """What pytest collects: file and test names by item, and arms by item."""

    def __init__(self) -> None:
        self.tests: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.arms: dict[int, set[str]] = defaultdict(set)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for test in session.items:
            arm = test.callspec.params.get("arm") if hasattr(test, "callspec") else None
            for marker in test.iter_markers("never_wrong"):
                number, *labels = marker.args
                self.tests[number][test.path.name].add(test.originalname)
                self.arms[number].update(labels or [str(arm)])


def collect() -> Collected:
    collected = Collected()
    paths = [str(HERE), *(str(HERE.parent / name) for name in ELSEWHERE)]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *paths], [collected])
    assert code == 0, shown.getvalue()
    return collected


def table(collected: Collected) -> str:
    lines = ["| | way to be wrong | tests |", "|---|---|---|"]
    for number, name in ITEMS.items():
        files = [
            f"`{file}`: {', '.join(sorted(test.removeprefix('test_') for test in tests))}"
            for file, tests in sorted(collected.tests[number].items())
        ]
        lines.append(f"| {number} | {name} | {'; '.join(files)} |")
    return "\n".join(lines) + "\n"


def split_readme() -> tuple[str, str]:
    """What comes before the table, and the table."""
    before, marker, after = (HERE / "README.md").read_text().partition("<!-- items -->\n")
    return before + marker, after.lstrip("\n")


@pytest.fixture(scope="module")
def collected() -> Collected:
    return collect()


@pytest.mark.parametrize("number", ITEMS, ids=lambda number: f"{number}-{ITEMS[number].replace(' ', '-')}")
def test_every_kernel_and_entry_has_a_test_of_every_item_it_has_a_part_in(collected, number):
    missing = NEEDED[number] - collected.arms[number]
    assert not missing, f"no test of {ITEMS[number]!r} on {sorted(missing)}"


def test_no_test_is_of_an_item_that_does_not_exist(collected):
    assert set(collected.tests) == set(ITEMS) == set(NEEDED)


def test_the_table_of_the_readme_is_what_the_markers_say(collected):
    assert split_readme()[1] == table(collected), f"write it anew: python {Path(__file__).relative_to(HERE.parents[1])}"


if __name__ == "__main__":
    (HERE / "README.md").write_text(split_readme()[0] + "\n" + table(collect()))
    sys.exit(0)
