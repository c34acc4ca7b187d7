"""The benchmark's GPU side: its logic on the CPU, its whole path in Triton's interpreter, and one shape on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
TINY = ("--tokens", "256", "--heads", "1", "--head-dim", "32", "--repeats", "1")


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def interpreter(monkeypatch):
    """The GPU's target on CPU tensors, in Triton's interpreter: all but the events, the facts and the cuDNN."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off")
    monkeypatch.setenv("SPARGE_CPU_KERNEL", "interpreted")
    from sparge_compile.bench.gpu_roofline import measure
    from sparge_compile.bench.gpu_target import target
    from sparge_compile.bench.timing import wall_clock

    def make():
        made = target(torch.device("cpu"), wall_clock)
        facts = {"GPU": "interpreter", "torch": torch.__version__, "date": "today"}
        peers = {name: peer for name, peer in made.peers.items() if name != "flex"}  # compiling it takes half a minute
        return replace(
            made,
            peers=peers,
            facts=lambda threads: facts,
            facts_after=lambda: {"clock, after": "none"},
            ceilings=lambda dtype: measure(made.device, dtype, wall_clock, size=64, copy_bytes=2**16),
            warm_up=0,
        )

    return make


def small(**changes):
    from sparge_compile.bench.problem import smooth_problem

    options = {"is_causal": False, "precision": "int8", "dtype": torch.float32, **changes}
    return smooth_problem(options.pop("tokens", 512), 2, 32, **options)


def test_the_whole_path_in_the_interpreter(interpreter, monkeypatch, capsys, tmp_path):
    import attention

    path = tmp_path / "result.json"
    sizes = [*TINY, "--causal", "yes", "--densities", "1", ".5"]
    with pytest.raises(SystemExit) as end:
        attention.main(["--device", "interpreter", *sizes, "--json", str(path)], {"interpreter": interpreter})
    printed = capsys.readouterr().out
    assert not end.value.code, printed

    content = json.loads(path.read_text())
    assert content["machine"]["clock, after"] == "none" and content["roofline"]["half"] > 0
    rows = {(row["variant"], row["density_asked"]): row for row in content["rows"]}
    assert [variant for variant, _ in rows][:4] == ["dense default", "dense cudnn", "dense flash", "dense sage"]
    assert list(rows)[4:] == [("sparge int8", 1), ("sparge int8", 0.5)]
    for refused in ("dense cudnn", "dense sage"):
        row = rows[refused, 1]
        assert row["trouble"] == "not measured" and row["note"] and row["milliseconds"] is None
    for density in (1, 0.5):
        row = rows["sparge int8", density]
        assert list(row["stages"]) == ["prepare", "loop", "keys", "queries", "select"]
        assert all(row[name] > 0 for name in ("milliseconds", "ratio", "roofline_share", "prepare_percent"))
    assert rows["sparge int8", 1]["relative_l1"] < 2e-2
    assert "Ceilings, measured here" in printed and "Stage 1 and quantization, at density 1" in printed


def test_a_kernel_that_is_wrong_or_dies_gets_its_row_and_the_exit_status(interpreter, capsys):
    import attention

    from sparge_compile.bench.peers import OURS, Peer

    def wrong():
        made = interpreter()
        kernel = made.peers[OURS]
        peers = {
            "dense default": made.peers["dense default"],
            OURS: replace(kernel, prepare=lambda problem: lambda: kernel.prepare(problem)() * 1.05),
            "other": Peer(lambda problem: 1 / 0, sparse=True),
        }
        return replace(made, peers=peers)

    sizes = [*TINY, "--causal", "no", "--densities", "1"]
    with pytest.raises(SystemExit) as end:
        attention.main(["--device", "interpreter", *sizes], {"interpreter": wrong})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 256")]
    assert end.value.code
    assert "baseline" in lines[0]
    assert "failed: relative L1 to" in lines[1]
    assert "not measured (ZeroDivisionError" in lines[2]


def test_the_gpu_has_its_own_defaults(interpreter):
    import options

    args, _ = options.parse(["--device", "it", "--head-dim", "64"], {"it": interpreter}, None)
    assert (args.head_dim, args.heads, args.causal, args.dtype) == ([64], 32, "both", "bfloat16")
    assert args.tokens == [4096, 8192, 16384, 32768, 65536] and args.budget_seconds == 450


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda"), "finds no GPU here"),
        (("--causal", "perhaps"), "invalid choice"),
        (("--budget-seconds", "0"), "is not above 0"),
        (("--plot", "a.png"), "pip install 'sparge-compile[plot]'"),
    ],
    ids=["cuda", "causal", "budget", "plot"],
)
def test_what_cannot_be_served_is_refused_before_anything_is_measured(monkeypatch, capsys, arguments, message):
    import attention
    import options

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        options.parse(arguments, attention.TARGETS, None)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("problem", ["memory", "memory of a CPU", "time", "bug"])
def test_a_shape_that_cannot_be_measured_says_why(monkeypatch, problem):
    import attention

    from sparge_compile.bench import cpu_target

    def fails(*_, **__):
        if problem == "memory of a CPU":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        raise torch.OutOfMemoryError("out of memory") if problem == "memory" else ValueError("no such thing")

    monkeypatch.setattr(attention, "smooth_problem", fails)
    args = SimpleNamespace(
        densities=[1.0], precision="int8", dtype="float32", heads=1, repeats=1, peers=["dense"], device="cpu"
    )
    size = attention.Size(32, False, 256)
    deadline = None if problem == "time" else float("inf")
    [[row]] = attention.measure(args, cpu_target.target(), size, deadline)
    assert row.trouble == ("failed" if problem == "bug" else "not measured")
    words = {"memory": "out of memory", "time": "--budget-seconds", "bug": "no such thing"}
    assert words.get(problem, "can't allocate memory") in row.note


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_a_selection_becomes_the_same_map_and_block_mask(is_causal):
    from sparge_compile.bench.block_mask import block_mask, kept_tiles
    from sparge_compile.bench.peers import predicted_tiles
    from sparge_compile.bench.problem import share

    kept = predicted_tiles(replace(small(is_causal=is_causal), choice=share(0.3)))
    # As lists: a part ascending, the rest ascending, then nothing that means anything.
    first = kept & (torch.arange(kept.shape[-1]) % 3 == 0)
    tiles = torch.full(kept.shape, 2**31 - 1, dtype=torch.int32)
    counts = torch.stack([first.sum(-1), (kept & ~first).sum(-1), torch.full(kept.shape[:-1], 8)], -1).int()
    for row in torch.cartesian_prod(*map(torch.arange, kept.shape[:-1])).tolist():
        both = torch.cat([first[tuple(row)].nonzero(), (kept & ~first)[tuple(row)].nonzero()])[:, 0]
        tiles[tuple(row)][: len(both)] = both
    assert torch.equal(kept_tiles(tiles, counts), kept)

    mask = block_mask(kept, 512, 512, is_causal)
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == int(kept.sum())
    assert torch.equal(mask.to_dense().bool(), kept)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_exact_rows_are_those_of_dense_attention(is_causal):
    from sparge_compile.bench.exact import ROWS, attention_rows, some_rows
    from sparge_compile.bench.problem import share
    from sparge_kernels import reference

    problem = small(is_causal=is_causal)
    expected = some_rows(problem)
    dense = F.scaled_dot_product_attention(*problem.inputs, is_causal=is_causal)
    assert expected.dense.shape == (1, 2, ROWS, 32)
    torch.testing.assert_close(expected.of(dense).double(), expected.dense, rtol=1e-4, atol=1e-4)

    problem = replace(problem, choice=share(0.3))
    sparse = reference.attention(
        *problem.inputs, thresholds=[problem.choice.thresholds], is_causal=is_causal, precision="none"
    )
    found = attention_rows(problem, expected.rows, sparse.kept)
    torch.testing.assert_close(expected.of(sparse.output).double(), found, rtol=1e-4, atol=1e-4)


def test_the_gate_knows_a_wrong_choice_of_tiles():
    from sparge_compile.bench.accuracy import Check, failure
    from sparge_compile.bench.exact import every_row
    from sparge_compile.bench.peers import CPU_PEERS
    from sparge_compile.bench.problem import of_policy
    from sparge_compile.policy import Policy

    problem = small(tokens=256)
    expected = every_row(problem)
    check = Check(problem, problem, expected, kept=expected.dense, selection=0.0)
    peer = replace(CPU_PEERS["sparge"], reference_limit=None)
    assert failure(peer, expected.dense, check) is None
    assert "chosen unlike the specification" in failure(peer, expected.dense, replace(check, selection=0.1))
    by_mass = replace(problem, choice=of_policy("default", Policy(), False, max_error=0.05))
    assert failure(peer, expected.dense, replace(check, problem=by_mass, selection=0.1)) is None
    off = replace(check, problem=by_mass, kept=None)
    assert "allowed is 0.05" in failure(peer, expected.dense * 1.1, off)
    assert "over the same tiles" in failure(peer, expected.dense, replace(check, kept=expected.dense * 1.1))


def test_the_gate_sees_one_wrong_row_among_many_and_equal_rows_of_zeros():
    from sparge_compile.bench.accuracy import Check, failure, least_cosine
    from sparge_compile.bench.exact import every_row
    from sparge_compile.bench.peers import CPU_PEERS

    problem = small(tokens=512)
    problem.v[:, 0] = 0  # a head whose output is zero: as like as can be
    check = Check(problem, problem, every_row(problem))
    wrong = check.expected.dense.clone()
    wrong[0, 1, 7] = 0
    for name, least in (("sparge", 0.95), ("dense fp32", 0.99), ("dense bf16", 0.99)):
        peer = replace(CPU_PEERS[name], reference_limit=None, exact_limit=1e-2)
        assert failure(peer, check.expected.dense, check) is None
        words = f"the worst row's cosine to dense fp32 is 0, allowed is {least} or more"
        assert failure(peer, wrong, check) == words
    # Without INT8 the row is out of the limit on all rows together, before its own.
    exact = replace(check, problem=replace(problem, precision="none"))
    assert failure(peer := CPU_PEERS["sparge"], check.expected.dense, exact) is None
    assert "relative L1 to dense fp32" in failure(peer, wrong, exact)
    assert least_cosine(peer, exact.problem) == 0.99 and least_cosine(peer, problem) == 0.95


def test_the_roofline_is_the_slower_of_products_and_memory():
    from sparge_compile.bench.gpu_roofline import Ceilings
    from sparge_compile.bench.rows import Row

    problem = small(tokens=256)  # [1, 2, 256, 32] fp32: 65536 bytes a tensor
    ceilings = Ceilings(copy=4 * 65536, half=100.0, int8=200.0)
    row = Row(256, 32, False, 1.0, "sparge int8", milliseconds=10e3, product_operations=600.0, stages={"prepare": 2e3})
    ceilings.judge(row, problem)
    assert row.roofline_share == pytest.approx((3 + 6) / 10)
    assert row.prepare_copy_share == pytest.approx((3 * 65536 + 2 * 16384) / (4 * 65536) / 2)
    assert ceilings.attention_seconds(replace(row, variant="flex"), problem) == pytest.approx(12)
    assert ceilings.attention_seconds(replace(row, product_operations=1.0), problem) == pytest.approx(1)
    assert Ceilings(1.0, 1.0, None).attention_seconds(row, problem) is None


def test_what_nvidia_smi_says_is_named():
    from sparge_compile.bench.gpu_machine import parse

    facts = parse("580.159.04, 345 MHz, 1980 MHz, 3201 MHz, 75.3 W, 700.00 W, 31\n")
    assert facts["driver"] == "580.159.04" and facts["SM clock"] == "345 MHz" and facts["temperature"] == "31"


def test_a_plot_is_drawn_from_the_json(tmp_path):
    pytest.importorskip("matplotlib")
    row = {
        "head_dim": 64,
        "is_causal": False,
        "tokens": 4096,
        "density_asked": 1.0,
        "ratio": 2.0,
        "variant": "sparge int8",
        "choice": "1",
    }
    rows = [
        row,
        {**row, "tokens": 8192},
        {**row, "variant": "flex"},
        {**row, "ratio": None, "variant": "dense default"},
    ]
    rows.append({**row, "is_causal": True, "density_asked": 0.5, "choice": "0.5"})
    content = {"machine": {"GPU": "none", "torch": "2", "date": "today"}, "rows": rows}
    source, picture = tmp_path / "a.json", tmp_path / "a.png"
    source.write_text(json.dumps(content))
    subprocess.run([sys.executable, "-m", "sparge_compile.bench.plot", source, picture], check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_small_shape_on_a_gpu(tmp_path):
    path = tmp_path / "result.json"
    sizes = ["--tokens", "2048", "--heads", "4", "--head-dim", "64", "--densities", "1", ".25", "--repeats", "5"]
    command = [sys.executable, str(BENCHMARKS / "attention.py"), "--device", "cuda", *sizes, "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(path.read_text())["rows"]
    for variant in ("dense default", "sparge int8", "flex"):
        assert all(row["milliseconds"] > 0 for row in rows if row["variant"] == variant), result.stdout
    assert all(row["issue_milliseconds"] > 0 and row["roofline_share"] > 0 for row in rows if row["milliseconds"])
