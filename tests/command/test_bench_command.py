"""`bench`: checks first, times second, a verdict and an exit status; with clocks of the tests' own."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from benching import SMALL, content, run

from sparge_compile.bench.rows import Row
from sparge_compile.bench.verdict import Verdict
from sparge_compile.command import bench, bench_options, bench_view, main, view
from sparge_compile.command.bench_result import Measured, Result
from sparge_kernels import ops
from sparge_kernels.cpu import KERNEL_VARIABLE, build

pytestmark = pytest.mark.skipif(ops.unavailable(torch.device("cpu")) is not None, reason="needs the CPU kernel")


def test_a_gain_its_json_and_its_words(capsys):
    assert run(*SMALL, "--json") == 0
    found = content(capsys)
    assert found["exit_meaning"] == "at least one size was measured"
    assert [row["variant"] for row in found["rows"]] == ["dense fp32", "dense bf16", "sparge int8", "sparge int8"]
    assert [row["choice"] for row in found["rows"][2:]] == ["default", "1"]
    assert [row["is_baseline"] for row in found["rows"]] == [False, True, False, False]
    (verdict,) = found["verdicts"]
    assert (verdict["tokens"], verdict["outcome"], verdict["ratio"]) == (256, "gain", 4.0)
    assert found["words"][0].startswith("At this size: 4.00 times as fast as the fastest dense peer (dense bf16)")
    assert found["settings"]["kv_heads"] == 2 and found["machine"]["torch"] == torch.__version__
    shapes = {name: [1, 2, 256, 32] for name in "qkv"}
    assert found["calls"] == [{**shapes, "dtype": "float32", "is_causal": False, "precision": "int8"}]


def test_what_is_printed_says_what_was_measured_and_fits_a_page(capsys):
    assert run(*SMALL) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and max(map(len, shown.splitlines())) <= 100
    inputs = "Inputs: smooth field, q, k and v [1, 2, 256, 32], float32, not causal, precision int8."
    assert inputs in " ".join(shown.split())
    default, whole = (line for line in shown.splitlines() if "sparge int8  " in line)
    assert "default" in default and "4.00 (4.00 .. 4.00)" in default and "200.0" in default
    assert " all " in whole and "no gain" not in shown


@pytest.mark.parametrize("columns", ["80", "40"])
def test_every_cell_is_whole_in_a_narrow_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich that is a terminal
    numbers = {"density": 0.41, "relative_l1": 0.013, "worst_cosine": 0.9712, "milliseconds": 12345.6}
    row = Row(131072, 128, False, None, "sparge int8", "default", **numbers)
    row.ratio, row.ratio_min, row.ratio_max = 5.87, 4.51, 6.24
    words = "a reason far longer than what is left of a line of the table, which is why it stands below"
    wrong = replace(row, variant="dense bf16", choice="", trouble="gate failed", note=words, milliseconds=None)
    rows = [replace(row, variant="dense fp32", ratio=None, is_baseline=True), row, wrong]
    verdict = Verdict(131072, "gain", "It is so.", 5.87)
    bench_view.show(Result({}, {"inputs": None}, None, [Measured(rows, verdict, None)]))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = [line.split() for line in shown.splitlines() if line.startswith("131072 ") and "tokens" not in line]
    numbers = ["1.3e-02", "0.971", "12346"]
    assert lines == [
        ["131072", "dense", "fp32", "41%", *numbers, "the", "baseline"],
        ["131072", "sparge", "int8", "default", "41%", *numbers, "5.87", "(4.51", "..", "6.24)"],
        ["131072", "dense", "bf16", "41%", *numbers[:2], "-", "see", "below"],
    ]
    assert f"131072 tokens, dense bf16: gate failed: {words}." in " ".join(shown.split())
    assert max(len(line.rstrip()) for line in shown.splitlines() if line.startswith("131072 ")) <= 80


def test_no_gain_is_said_and_is_no_failure(capsys):
    assert run(*SMALL, "--tokens", "128", "256", "--json", seconds=(1.0, 0.8, 1.6, 1.6)) == 0
    found = content(capsys)
    assert [one["outcome"] for one in found["verdicts"]] == ["no gain"] * 2
    assert found["words"][0].startswith("No gain at 128 tokens: 0.50 times as fast")
    assert "Break-even: not reached, 256 tokens is the longest measured." in found["words"]


def test_topk_is_the_policys_and_the_verdict_is_on_it(capsys):
    bounds = ("--max-error", "1", "--min-row-cosine", "-1")
    sizes = (*SMALL, "--tokens", "1024", "--topk", ".3", *bounds, "--density", "1", ".5", "--json")
    assert run(*sizes, seconds=(1.0, 0.8, 0.1, 0.4, 0.3)) == 0
    found = content(capsys)
    assert [row["choice"] for row in found["rows"][2:]] == ["topk 0.3", "1", "0.5"]
    assert "(topk 0.3, " in found["words"][0] and found["verdicts"][0]["ratio"] == pytest.approx(8)
    assert found["rows"][-1]["density"] == pytest.approx(0.5)


def test_grouped_heads_batches_causal_and_odd_lengths(capsys):
    sizes = ("--device", "cpu", "--tokens", "300", "--heads", "4", "--kv-heads", "2", "--batch", "2")
    options = ("--head-dim", "24", "--dtype", "float16", "--causal", "--repeats", "1", "--json")
    assert run(*sizes, *options, seconds=(1.0, 1.0, 1.0, 0.5, 0.5)) == 0
    found = content(capsys)
    assert [row["variant"] for row in found["rows"][:3]] == ["dense fp16", "dense fp32", "dense bf16"]
    ours = found["rows"][3]
    assert (ours["tokens"], ours["is_causal"], ours["ratio"]) == (300, True, 2.0) and ours["relative_l1"] < 0.02
    assert found["verdicts"][0]["outcome"] == "unclear"  # of one round


def test_a_size_that_memory_cannot_hold_is_said_and_the_others_measured(capsys, monkeypatch):
    made = bench.smooth_problem

    def too_large(tokens, **options):
        if tokens > 256:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return made(tokens, **options)

    monkeypatch.setattr(bench, "smooth_problem", too_large)
    assert run(*SMALL, "--tokens", "512", "256", "--json") == 0
    found = content(capsys)
    assert [(one["tokens"], one["outcome"]) for one in found["verdicts"]] == [(256, "gain"), (512, "not measured")]
    assert "can't allocate memory" in found["words"][1]


def test_nothing_left_of_the_budget_is_said_and_is_status_3(capsys):
    assert run(*SMALL, "--budget-seconds", "1e-9", "--json") == 3
    found = content(capsys)
    assert "no time left, raise --budget-seconds" in found["words"][0]
    assert found["exit_code"] == 3 and found["exit_meaning"].startswith("nothing was measured")


def test_a_size_whose_fewest_rounds_do_not_fit_is_not_begun(capsys):
    # One look at 256 of 256 queries takes 10 s: 1 + 2 + 2 * 2 checks and 3 rounds of 4 variants are 19 such calls.
    assert run(*SMALL, "--json", probe=10.0) == 3
    found = content(capsys)
    assert found["words"][0].startswith("Not measured at 256 tokens: it needs about 190 s and 4")
    assert found["words"][0].endswith("raise --budget-seconds.") and len(found["rows"]) == 1
    assert run(*SMALL, "--budget-seconds", "190", "--json", probe=10.0) == 3  # making the inputs took some of it
    assert run(*SMALL, "--budget-seconds", "250", "--json", probe=10.0) == 0


def test_an_interrupt_shows_what_there_is_and_is_status_130(capsys, monkeypatch, tmp_path):
    made = bench.smooth_problem

    def interrupted(tokens, **options):
        if tokens > 256:
            raise KeyboardInterrupt
        return made(tokens, **options)

    monkeypatch.setattr(bench, "smooth_problem", interrupted)
    path = tmp_path / "a.json"
    assert run(*SMALL, "--tokens", "256", "512", "--json", str(path)) == 130
    shown = capsys.readouterr().out
    assert "At 256 tokens: 4.00 times" in " ".join(shown.split()) and "Interrupted" in shown
    assert [one["tokens"] for one in json.loads(path.read_text())["verdicts"]] == [256]
    monkeypatch.setattr(bench, "find", lambda *_: interrupted(512))
    assert run(*SMALL) == 130 and "Interrupted" in capsys.readouterr().out


def test_a_plot_and_a_file(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture, path = tmp_path / "a.png", tmp_path / "a.json"
    assert run(*SMALL, "--plot", str(picture), "--json", str(path)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "At this size" in capsys.readouterr().out and json.loads(path.read_text())["exit_code"] == 0


def test_a_disk_that_is_full_in_the_end_costs_nothing_that_was_measured(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "a.json")

    monkeypatch.setattr(view, "write_json", full)
    assert run(*SMALL, "--json", "a.json") == 1
    shown = capsys.readouterr()
    assert "At this size: 4.00" in shown.out and "Not written: " in shown.err and "No space left" in shown.err


def test_json_has_no_nan(capsys):
    view.write_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": {"c": float("-inf")}}, "-")
    assert content(capsys) == {"a": [None, 1.5, [None]], "b": {"c": None}}


@pytest.mark.parametrize("is_terminal", [False, True], ids=["pipe", "terminal"])
def test_progress_is_shown_on_a_real_terminal_only(monkeypatch, is_terminal):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with view.progress() as announce:
        announce("size 1 of 2")
    assert bool(stream.getvalue()) == is_terminal


def test_a_slow_kernel_by_choice_is_said_among_the_last_lines(capsys, monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "blocked")
    assert run(*SMALL, "--json") == 0
    assert any(line.startswith(f"{KERNEL_VARIABLE}=blocked chose a kernel") for line in content(capsys)["words"])


def test_a_kernel_that_cannot_run_is_status_1_and_points_to_the_doctor(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_results", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent")
    assert run(*SMALL) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "Nothing was measured: the kernel cannot run" in shown and "python -m sparge_compile doctor" in shown


def test_the_statuses_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert all(words in shown for words in bench_options.STATUS.values())
