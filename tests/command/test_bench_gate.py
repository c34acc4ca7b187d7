"""What `bench` believes: a kernel that is wrong anywhere is not timed, and want of memory is no wrong kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benching import SMALL, content, run

from sparge_compile.bench.peers import OURS
from sparge_kernels import ops

pytestmark = pytest.mark.skipif(ops.unavailable(torch.device("cpu")) is not None, reason="needs the CPU kernel")
LONG = (*SMALL, "--tokens", "640")


def ours(change):
    """The peers with `change(output, problem)` in place of the kernel's output."""

    def changed(peers):
        sound = peers[OURS]

        def prepare(problem):
            call = sound.prepare(problem)
            return lambda: change(call(), problem)

        return {**peers, OURS: replace(sound, prepare=prepare)}

    return changed


def zeros_at_the_end(output, problem):
    """Wrong at lengths only that the reference does not see, and in a mean over all rows hardly."""
    output = output.clone()
    if output.shape[2] > 512:
        output[:, :, -3:] = 0
    return output


@pytest.mark.parametrize("how", ["scaled", "nan", "rows"])
def test_a_wrong_kernel_is_not_timed_and_is_status_1(capsys, how):
    changes = {
        "scaled": lambda output, _: output * 1.2,
        "nan": lambda output, _: output * float("nan"),
        "rows": zeros_at_the_end,
    }
    assert run(*LONG, "--json", peers=ours(changes[how])) == 1
    found = content(capsys)
    assert found["exit_code"] == 1 and found["verdicts"][0]["outcome"] == "gate failed"
    assert found["words"][0].startswith("Accuracy gate failed at 640 tokens (sparge int8, ")
    assert found["words"][0].endswith("Nothing was timed.")
    assert ("the worst row's cosine to dense fp32 is 0, " in found["words"][0]) == (how == "rows")
    assert all(row["milliseconds"] is None for row in found["rows"])


def test_the_check_of_all_tiles_is_made_also_where_nobody_asked_for_that_row(capsys):
    def wrong_with_all_tiles(output, problem):
        return zeros_at_the_end(output, problem) if problem.choice.keeps_all else output

    half = (*LONG, "--density", ".5", "--json")
    assert run(*half) == 0
    assert [row["choice"] for row in content(capsys)["rows"][2:]] == ["default", "0.5"]
    assert run(*half, peers=ours(wrong_with_all_tiles)) == 1
    assert "(sparge int8, all tiles): the worst row's cosine" in content(capsys)["words"][0]


def test_a_dense_peer_that_is_wrong_in_some_rows_is_no_baseline(capsys):
    def broken(peers):
        sound = peers["dense bf16"]

        def prepare(problem):
            call = sound.prepare(problem)
            return lambda: zeros_at_the_end(call(), problem)

        return {**peers, "dense bf16": replace(sound, prepare=prepare)}

    assert run(*LONG, peers=broken) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "see below" in shown and "640 tokens, dense bf16: gate failed: the worst row's cosine" in shown
    assert "the fastest dense peer (dense fp32)" in shown


def test_the_gates_of_the_chosen_thresholds_are_the_users(capsys):
    assert run(*SMALL, "--max-error", "1e-9", "--json") == 1
    assert "allowed is 1e-09" in content(capsys)["words"][0]
    sparse = (*SMALL, "--tokens", "1024", "--topk", ".3", "--max-error", "9")  # its worst row has a cosine of .974
    assert run(*sparse, "--min-row-cosine", ".98", "--json") == 1
    assert "allowed is 0.98 or more" in content(capsys)["words"][0]
    assert run(*sparse) == 0


@pytest.mark.parametrize(
    ("error", "code", "outcome", "words"),
    [
        (RuntimeError("illegal instruction"), 1, "failed", "Failed at 256 tokens (sparge int8, default thresholds): "),
        (MemoryError("no memory"), 3, "not measured", "Not measured at 256 tokens: MemoryError: no memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 3, "not measured", "Not measured at"),
        (torch.OutOfMemoryError("CUDA out of memory"), 3, "not measured", "Not measured at"),
    ],
    ids=["error", "the kernel's memory", "a CPU's", "a GPU's"],
)
def test_a_kernel_that_dies_and_one_without_memory_are_no_failed_gates(capsys, error, code, outcome, words):
    def broken(peers):
        def prepare(problem):
            raise error

        return {**peers, OURS: replace(peers[OURS], prepare=prepare)}

    assert run(*SMALL, "--json", peers=broken) == code
    found = content(capsys)
    assert found["verdicts"][0]["outcome"] == outcome and found["words"][0].startswith(words)


@pytest.mark.parametrize("error", [MemoryError("no memory"), ValueError("a fault")], ids=["memory", "fault"])
def test_what_goes_wrong_outside_of_the_kernel_too(capsys, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("sparge_compile.bench.rows.rounds", broken)
    assert run(*SMALL, "--json") == (3 if isinstance(error, MemoryError) else 1)
    found = content(capsys)
    assert found["verdicts"][0]["outcome"] == ("not measured" if isinstance(error, MemoryError) else "failed")
