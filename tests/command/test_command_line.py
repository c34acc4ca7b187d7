"""`python -m sparge_compile`: what it says without a command, and what it costs those who never call it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparge_compile.command import main


def test_without_a_command_it_shows_help_with_examples(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for words in ("doctor", "bench", "examples:", "python -m sparge_compile bench --inputs qkv.safetensors"):
        assert words in shown


@pytest.mark.parametrize("arguments", [["magic"], ["doctor", "--magic"], ["bench", "--magic"]], ids=" ".join)
def test_wrong_usage_is_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_importing_the_package_imports_nothing_of_the_commands():
    program = "import sys, sparge_compile; print([name for name in sys.modules if name.startswith(%r)])"
    names = ("sparge_compile.bench", "sparge_compile.command", "rich", "matplotlib")
    result = subprocess.run([sys.executable, "-c", program % (names,)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
