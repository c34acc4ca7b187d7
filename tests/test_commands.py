"""What documents tell a reader to type: README's blocks are run in a fresh copy; every other command is understood."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

from sources import ROOT, copy_sources

README = ROOT / "README.md"
FOLDERS = ("docs", "examples/*", "tests/*", "benchmarks/results")
DOCUMENTS = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/*.md")))]
PYTHON = re.compile(r"(?:\S+=\S+ )*(?:\.venv/bin/)?python3? ")
SHORTER = {
    "examples/quickstart.py": "--tokens 8192 --sequences 1",
    "-m pytest": "-p no:cacheprovider tests/test_release.py -k public_name",  # CI runs the block as it stands
}


def tokens_of(document: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(document.read_text())


def blocks_of(document: Path) -> list[str]:
    return [token.content for token in tokens_of(document) if token.type == "fence" and token.info == "bash"]


def steps_of(block: str) -> list[str]:
    return [step.strip() for step in re.split(r"&&|\n", block) if step.strip()]


def commands_of(document: Path) -> Iterator[str]:
    """Each line and step of its shell blocks, and all that stands between backquotes."""
    for block in blocks_of(document):
        yield from steps_of(block)
    for token in tokens_of(document):
        yield from (child.content for child in token.children or () if child.type == "code_inline")


def scripts() -> dict[tuple[str, ...], list[str]]:
    """By script, module or subcommand: the options that documents call it with."""
    options: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for document in DOCUMENTS:
        for command in filter(PYTHON.match, commands_of(document)):
            words = shlex.split(PYTHON.sub("", command))
            length = (3 if words[1] == "sparge_compile" else 2) if words[0] == "-m" else 1
            script = words[:length]
            if script[0] != "-m" and not (ROOT / script[0]).exists():
                script = [str((document.parent / script[0]).relative_to(ROOT))]  # typed in the document's folder
            options[tuple(script)] += words[length:]
    return options


SCRIPTS = scripts()
WITH_OPTIONS = [script for script in SCRIPTS if script not in (("-m", "venv"), ("-m", "pytest"))]


def test_the_commands_are_found():
    assert len(SCRIPTS) > 15


@pytest.mark.parametrize("script", WITH_OPTIONS, ids=" ".join)
def test_a_command_has_the_options_it_is_called_with(script):
    result = subprocess.run([sys.executable, *script, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    called_with = {word for word in SCRIPTS[script] if word.startswith("--")}
    assert called_with <= set(re.findall(r"--[a-z0-9-]+", result.stdout))


def test_the_tests_that_documents_name_exist():
    assert [path for path in SCRIPTS["-m", "pytest"] if not (ROOT / path).exists()] == []


def test_the_extras_that_documents_install_exist():
    commands = [command for document in DOCUMENTS for command in commands_of(document) if "pip install" in command]
    named = {
        extra for command in commands for extras in re.findall(r"\[(.*?)\]", command) for extra in extras.split(",")
    }
    assert {"examples", "test", "dev"} <= named
    assert named <= set(importlib.metadata.metadata("sparge-compile").get_all("Provides-Extra") or ())


@pytest.fixture
def newcomer(tmp_path):
    """Runs a block step by step in a fresh copy of the project; what it installs comes from here, not from an index."""
    copy_sources(tmp_path)
    here = [path for path in sys.path if any(Path(path).glob("*.dist-info"))]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))

    def run(block: str) -> str:
        printed = ""
        for step in steps_of(block):
            name = PYTHON.sub("", step)
            command = f"{step} {SHORTER.get(name, '')}"
            if "pip install" in step:
                installed = f"torch=={torch.__version__.partition('+')[0]}"
                command = re.sub(r"torch==\S+", installed, step) + " --no-index --no-build-isolation"
            result = subprocess.run(
                command,
                shell=True,
                capture_output=True,
                text=True,
                timeout=280,
                cwd=tmp_path,
                env={**os.environ, "PATH": path},
            )
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            for packages in tmp_path.glob(".venv/lib/python*/site-packages"):
                # At the front, since a new environment's own setuptools may be too old.
                (packages / "here.pth").write_text(f"import sys; sys.path[:0] = {here!r}")
            printed += result.stdout
        return printed

    return run


def test_readmes_quickstart_rewrites_every_call_and_recalls_as_dense_does(newcomer):
    (block,) = [block for block in blocks_of(README) if "quickstart.py" in block]
    printed = newcomer(block)
    assert "2 of 2 attention calls rewritten" in printed
    recall = dict(re.findall(r"^(dense|sparse) +([\d.]+)%", printed, re.MULTILINE))
    assert float(recall["dense"]) > 95
    assert float(recall["sparse"]) >= float(recall["dense"]) - 1
    (row,) = [line for line in printed.splitlines() if line.startswith("blocks.{0-1}.attention x2")]
    density = [float(number) for number in re.findall(r"\d\.\d{3}", row)]
    assert max(density) < 1, "nothing was skipped, so nothing was tested"


def test_readmes_test_command_runs_tests(newcomer):
    (block,) = [block for block in blocks_of(README) if "-m pytest" in block]
    assert "1 passed" in newcomer(block)
