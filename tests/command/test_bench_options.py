"""What `bench` is asked for and cannot do: said at once, without torch, with what is allowed, and status 2."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparge_compile.bench import problem
from sparge_compile.command import bench_options, main
from sparge_kernels import ops

NO_TORCH = "import sys; sys.modules['torch'] = None\nfrom sparge_compile.command import main\nsys.exit(main(%r))"


def refused(capsys, *arguments):
    """The message."""
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--heads", "6", "--kv-heads", "4"), "--heads 6 is not a multiple of --kv-heads 4"),
        (("--head-dim", "300"), "allowed: 1 to 256"),
        (("--tokens", "0"), "0 is not a whole number of 1 or more"),
        (("--tokens", "abc"), "abc is not a whole number of 1 or more"),
        (("--topk", "2"), "2 is not a number in (0, 1]"),
        (("--density", "half"), "half is not a number in (0, 1]"),
        (("--max-error", "inf"), "inf is not a number above 0"),
        (("--budget-seconds", "inf"), "inf is not a number above 0"),
        (("--budget-seconds", "nan"), "nan is not a number above 0"),
        (("--min-row-cosine", "1"), "1 is not a number in [-1, 1)"),
        (("--threads", "100000"), f"allowed: 1 to {os.cpu_count()}"),
        (("--peers", "magic"), "allowed: dense, flex"),
        (("--device", "cuda"), "finds no GPU here"),
        (("--inputs", "q.pt", "--heads", "2"), "leave out --heads"),
        (("--inputs", "nowhere.pt"), "nowhere.pt is no file"),
        (("--json", "nowhere/a.json"), "--json nowhere/a.json: its folder is not there"),
        (("--json", "."), "--json . is a folder"),
        (("--json", "a" * 300), "File name too long"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_served_is_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "--peers" in arguments and ops.unavailable(torch.device("cpu")) is not None:
        pytest.skip("needs the CPU kernel")
    shown = refused(capsys, *arguments)
    assert message in shown and "_positive" not in shown


def test_pictures_that_cannot_be_drawn_are_refused_before_measuring(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert "no picture has this ending; allowed: " in refused(capsys, "--plot", str(tmp_path / "a.xyz"))
    assert "no picture has this ending" in refused(capsys, "--plot", str(tmp_path / "a"))
    assert "is a folder" in refused(capsys, "--plot", str(tmp_path))


def test_a_file_without_permission_is_refused_before_measuring(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_options.os, "access", lambda path, mode: False)  # tests may run as root
    assert "cannot be written" in refused(capsys, "--json", str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 0, "examples:"),
        (["--help"], 0, "examples:"),
        (["bench", "--help"], 0, "nothing was measured, for want of time"),
        (["magic"], 2, "invalid choice"),
        (["bench", "--tokens", "abc"], 2, "abc is not a whole number"),
        (["bench", "--threads", "100000"], 2, "allowed: 1 to"),
        (["bench"], 1, "bench cannot start (ModuleNotFoundError"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_torch_is_needed_to_measure_and_for_nothing_before(arguments, code, words):
    result = subprocess.run([sys.executable, "-c", NO_TORCH % arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    assert words in result.stdout + result.stderr and "Traceback" not in result.stderr


def test_the_options_name_what_there_is():
    assert tuple(problem.DTYPES) == bench_options.DTYPES
    from sparge_compile.bench.targets import TARGETS

    assert list(bench_options.DEFAULTS) == list(TARGETS)
