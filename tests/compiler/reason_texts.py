"""The texts of all reasons for which a call stays dense, read from the code, and the table of them for the documents.

`python tests/compiler/reason_texts.py --write` puts the table into docs/troubleshooting.md.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from sparge_compile.reasons import kind_of

ROOT = Path(__file__).resolve().parents[2]
# What a user reads, but not of a call: errors of a profile, of calibration, of the helpers for tests.
_ELSEWHERE = ("functional.py", "calibrating.py", "calibration.py", "reasons.py", "build.py")
_FOLDERS = ("sparge_compile", "sparge_compile/matchers", "kernels/sparge_kernels", "kernels/sparge_kernels/cpu")
_FOLDERS = (*_FOLDERS, "kernels/sparge_kernels/triton")
_REFUSALS = {"Refusal": 0, "_Refused": 0, "Unread": 0, "Reason": 1}
_ANSWERS = {"supported_device", "check_static", "unavailable", "unmeasured", "_interpreter_unavailable", "reserved"}
_ANSWERS |= {"_unmatched", "bind", "_operand"}
_CONSTANTS = {"_OTHERS", "_BLOCKERS", "_OUTSIDE", "_CUT_OFF", "_DENSE_AT_RUN_TIME", "_NESTED", "_PASSED_OVER"}
_CONSTANTS |= {"_CAPS", "_PAST_THE_LIMIT"}
_BEFORE = {"Unread": "attention written out, and not read: "}
WHATEVER = "…"
PAGE = ROOT / "docs" / "troubleshooting.md"
_MARKED = re.compile(r"<!-- reasons -->\n(.*?)<!-- end -->", re.DOTALL)


@functools.cache
def texts() -> list[str]:
    """Each text once, in the order of the files; what differs from call to call is `WHATEVER`."""
    files = [file for folder in _FOLDERS for file in sorted((ROOT / folder).glob("*.py"))]
    trees = [ast.parse(file.read_text()) for file in files if file.name not in _ELSEWHERE]
    constants = {name: node for tree in trees for name, node in _assigned(tree)}
    return list(dict.fromkeys(text for tree in trees for text in _of_file(tree, constants)))


def table() -> str:
    """A row for each text: the message, why, and what to do."""
    rows = ["| message | why | what to do |", "|---|---|---|"]
    for text in sorted(set(texts()) - {_BEFORE["Unread"] + WHATEVER}, key=str.lower):
        kind = kind_of(text)
        assert kind is not None, text
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (text, kind.why, kind.change)) + " |")
    return "\n".join(rows)


def _of_file(tree: ast.Module, constants: dict[str, ast.expr]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _REFUSALS:
            place = _REFUSALS[node.func.id]
            if len(node.args) > place:
                before = _BEFORE.get(node.func.id, "")
                yield from (before + text for text in _written(node.args[place], constants))
        for value in _reasons_at(node):
            yield from _written(value, constants)
    for name, value in _assigned(tree):
        if name in _CONSTANTS:
            yield from _written(value, constants)


def _reasons_at(node: ast.AST) -> Iterator[ast.expr]:
    """`unmatched=...`, `reason = ...`, and what the functions return that answer with a reason."""
    if isinstance(node, ast.keyword) and node.arg == "unmatched":
        yield node.value
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "reason":
        yield node.value
    if isinstance(node, ast.FunctionDef) and node.name in _ANSWERS:
        answers = (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return))
        yield from (answer for answer in answers if answer is not None)


def _assigned(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _written(node: ast.expr, constants: dict[str, ast.expr]) -> Iterator[str]:
    """The texts that an expression may be, as far as they are written in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else WHATEVER for part in node.values)
        if " " in text.replace(WHATEVER, "").strip():
            yield text
    elif isinstance(node, ast.Name) and isinstance(constants.get(node.id), (ast.Constant, ast.JoinedStr)):
        yield from _written(constants[node.id], constants)
    elif isinstance(node, (ast.Dict, ast.BoolOp)):
        for value in node.values:
            yield from _written(value, constants)
    elif isinstance(node, ast.IfExp):
        yield from _written(node.body, constants)
        yield from _written(node.orelse, constants)


def of_page() -> str:
    """The table as it stands in the documents."""
    found = _MARKED.search(PAGE.read_text())
    assert found is not None
    return found[1].strip()


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(_MARKED.sub(lambda _: f"<!-- reasons -->\n{table()}\n<!-- end -->", PAGE.read_text()))
    else:
        print(table())
