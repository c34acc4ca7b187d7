"""`bench`: checks first, times second, a verdict and an exit status; with clocks of the tests' own."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace

import pytest
import torch

from sparge_compile.bench import cpu_target
from sparge_compile.bench.peers import OURS
from sparge_compile.bench.timing import Timing
from sparge_compile.command import bench, main
from sparge_compile.command.bench_options import add_arguments
from sparge_kernels import ops
from sparge_kernels.cpu import build

pytestmark = pytest.mark.skipif(ops.unavailable(torch.device("cpu")) is not None, reason="needs the CPU kernel")

SMALL = ("--device", "cpu", "--tokens", "256", "--heads", "2", "--head-dim", "32", "--repeats", "3")
PEERS = ("dense fp32", "dense bf16", "ours", "ours, all tiles")


def run(*arguments, seconds=(1.0, 0.8, 0.2, 0.4), peers=None):
    """The exit status, with what each variant of PEERS takes."""

    def target():
        clock = itertools.cycle(seconds)

        def stopwatch(call):
            taken = next(clock)
            return lambda: Timing(taken)

        made = replace(cpu_target.target(), stopwatch=stopwatch)
        return made if peers is None else replace(made, peers=peers(dict(made.peers)))

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with torch.random.fork_rng():
        return bench.run(parser, parser.parse_args(arguments), {"cpu": target})


def content(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_gain_its_json_and_its_table(capsys):
    assert run(*SMALL, "--json") == 0
    found = content(capsys)
    assert set(found) == {"version", "machine", "settings", "rows", "verdicts", "words", "exit_code"}
    assert [row["variant"] for row in found["rows"]] == ["dense fp32", "dense bf16", "sparge int8", "sparge int8"]
    assert [row["choice"] for row in found["rows"][2:]] == ["default", "1"]
    (verdict,) = found["verdicts"]
    assert (verdict["tokens"], verdict["outcome"], verdict["ratio"]) == (256, "gain", 4.0)
    assert found["words"][0].startswith("At this size: 4 times as fast as the fastest dense peer (dense bf16)")
    assert found["settings"]["kv_heads"] == 2 and found["machine"]["torch"] == torch.__version__

    assert run(*SMALL) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and max(map(len, shown.splitlines())) <= 100
    (ours,) = [line for line in shown.splitlines() if "sparge int8  default " in line]
    assert "4.00 (4.00 .. 4.00)" in ours and "200.00" in ours


def test_no_gain_is_said_and_is_no_failure(capsys):
    assert run(*SMALL, "--tokens", "128", "256", "--json", seconds=(1.0, 0.8, 1.6, 1.6)) == 0
    found = content(capsys)
    assert [one["outcome"] for one in found["verdicts"]] == ["no gain"] * 2
    assert found["words"][0].startswith("No gain at 128 tokens: 0.5 times as fast")
    assert "Break-even: not reached, 256 tokens is the longest measured." in found["words"]


@pytest.mark.parametrize("how", ["wrong", "nan", "dies"])
def test_a_failed_gate_times_nothing_and_is_status_1(capsys, how):
    def broken(peers):
        sound = peers[OURS]

        def prepare(problem):
            if how == "dies":
                raise MemoryError("no memory")
            return lambda: sound.prepare(problem)() * (1.2 if how == "wrong" else float("nan"))

        return {**peers, OURS: replace(sound, prepare=prepare)}

    assert run(*SMALL, "--json", peers=broken) == 1
    found = content(capsys)
    assert found["exit_code"] == 1 and found["verdicts"][0]["outcome"] == "gate failed"
    assert found["words"][0].startswith("Accuracy gate failed at 256 tokens (sparge int8)")
    assert found["words"][0].endswith("Nothing was timed.")
    assert all(row["milliseconds"] is None for row in found["rows"])


def test_the_gate_of_the_default_thresholds_is_the_users(capsys):
    assert run(*SMALL, "--max-error", "1e-9", "--json") == 1
    assert "allowed is 1e-09" in content(capsys)["words"][0]


def test_topk_is_the_policys_and_the_verdict_is_on_it(capsys):
    sizes = (*SMALL, "--tokens", "1024", "--topk", ".3", "--max-error", "1", "--density", "1", ".5", "--json")
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


def test_nothing_left_of_the_budget_is_said(capsys):
    assert run(*SMALL, "--budget-seconds", "1e-9", "--json") == 0
    assert "no time left, raise --budget-seconds" in content(capsys)["words"][0]


def test_a_plot_and_a_file(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture, path = tmp_path / "a.png", tmp_path / "a.json"
    assert run(*SMALL, "--plot", str(picture), "--json", str(path)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "At this size" in capsys.readouterr().out and json.loads(path.read_text())["exit_code"] == 0


def test_a_kernel_that_cannot_run_is_status_1_and_points_to_the_doctor(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_results", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent")
    assert run(*SMALL) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "Nothing was measured: the kernel cannot run" in shown and "python -m sparge_compile doctor" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--heads", "6", "--kv-heads", "4"), "--heads 6 is not a multiple of --kv-heads 4"),
        (("--head-dim", "300"), "allowed: 1 to 256"),
        (("--tokens", "0"), "0 is not 1 or more"),
        (("--topk", "2"), "2 is not in (0, 1]"),
        (("--peers", "magic"), "allowed: dense, flex"),
        (("--device", "cuda"), "finds no GPU here"),
        (("--inputs", "q.pt", "--heads", "2"), "leave out --heads"),
        (("--inputs", "nowhere.pt"), "nowhere.pt is no file"),
        (("--json", "nowhere/a.json"), "--json nowhere/a.json: its folder is not there"),
    ],
    ids=["groups", "head dim", "tokens", "topk", "peer", "GPU", "shape of a file", "file", "folder"],
)
def test_what_cannot_be_served_is_status_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err
