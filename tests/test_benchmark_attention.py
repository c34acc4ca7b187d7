"""The benchmark's one command at sizes a test can afford: it checks first, times second, and says all of it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments):
    command = [sys.executable, str(BENCHMARKS / "attention.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_one_command_prints_a_checked_table_and_writes_the_same_as_json(tmp_path):
    path = tmp_path / "result.json"
    sizes = ["--tokens", "512", "--heads", "1", "--densities", "1", ".25", "--repeats", "1", "--peers", "dense"]
    result = run(*sizes, "--json", str(path))
    assert result.returncode == 0, result.stdout + result.stderr

    head, *lines = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    table = [dict(zip(head, line, strict=False)) for line in lines]
    variants = ["dense fp32", "dense bf16", "sparge int8"]
    assert [row["variant"] for row in table] == variants * 3
    assert [row["density asked"] for row in table[2::3]] == ["1", "0.25", "1 tile a row"]
    assert [row["density"] for row in table[2::3]] == ["1.000", "0.250", "0.125"]
    assert all(float(row["time (ms)"]) >= 0 for row in table)
    assert "of the baseline" in table[-1]["note"]

    content = json.loads(path.read_text())
    assert content["machine"]["torch"] == torch.__version__
    rows = content["rows"]
    assert [row["variant"] for row in rows] == variants * 3
    for row in rows:
        assert row["milliseconds"] > 0 and row["gflops"] > 0 and row["trouble"] is None
        assert "no gain" not in row["note"]  # nothing is said of one round
    assert [sum(row["is_baseline"] for row in rows[i : i + 3]) for i in (0, 3, 6)] == [1, 1, 1]
    full, quarter = rows[2], rows[5]
    assert full["relative_l1"] < 2e-2 < quarter["relative_l1"]
    assert full["worst_cosine"] > quarter["worst_cosine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "--device tpu: nothing is registered"),
        (("--tokens", "1000"), "not a multiple of 128"),
        (("--densities", "0"), "not in (0, 1]"),
        (("--peers", "magic"), "allowed: dense, flex"),
    ],
    ids=["device", "tokens", "density", "peer"],
)
def test_an_argument_it_cannot_serve_is_named(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize("wrong", ["scaled", "nan"])
@pytest.mark.parametrize("density", [1.0, 0.25])
def test_a_wrong_output_gets_a_reason_and_no_time(wrong, density):
    from sparge_compile.bench.cpu_target import target
    from sparge_compile.bench.peers import CPU_PEERS, Peer, sparge
    from sparge_compile.bench.problem import share, smooth_problem
    from sparge_compile.bench.rows import Shape
    from sparge_compile.bench.table import CPU_COLUMNS, table_line

    factor = 1.05 if wrong == "scaled" else float("nan")
    peers = {
        "dense fp32": CPU_PEERS["dense fp32"],
        "sparge": Peer(lambda problem: lambda: sparge(problem)() * factor, sparse=True, reference_limit=1e-2),
    }
    problem = smooth_problem(256, 1, 32, is_causal=False, precision="int8", dtype=torch.float32)
    shape = Shape(replace(target(), peers=peers), problem, small=problem, repeats=1)
    rows = shape.measure([share(density)])
    assert rows[0].milliseconds and not rows[0].failed
    assert rows[1].failed and rows[1].milliseconds is None and rows[1].extra_memory_percent is None
    assert "| - | - | - | - | failed: " in table_line(CPU_COLUMNS, rows[1])


def test_flex_gets_the_tiles_that_the_kernel_keeps():
    from sparge_compile.bench.block_mask import block_mask
    from sparge_compile.bench.peers import predicted_tiles, sparge_density
    from sparge_compile.bench.problem import share, smooth_problem

    for is_causal in (False, True):
        problem = smooth_problem(512, 2, 32, is_causal=is_causal, precision="int8", dtype=torch.float32)
        problem = replace(problem, choice=share(0.25))
        mask = block_mask(predicted_tiles(problem), 512, 512, is_causal)
        kept = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        assert kept == round(sparge_density(problem) * problem.visible_tiles())
