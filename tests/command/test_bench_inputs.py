"""`bench --inputs`: the user's own tensors, from what users save, and clear words about what is no attention call."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from sparge_compile.bench.exact import every_row, some_rows
from sparge_compile.bench.inputs import InputsError, load_problem
from sparge_compile.bench.peers import CPU_PEERS
from sparge_compile.command import main
from sparge_kernels import ops

OPTIONS = {"is_causal": True, "precision": "int8", "dtype": None, "device": torch.device("cpu")}


def call(q_len=200, k_len=330, q_heads=4, kv_heads=2, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, q_heads, q_len, 24), (batch, kv_heads, k_len, 24), (batch, kv_heads, k_len, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def save(path, tensors, names="qkv"):
    content = dict(zip(names, tensors, strict=True))
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["call.safetensors", "call.pt"])
def test_a_file_is_the_call_it_holds(tmp_path, name):
    tensors = call(dtype=torch.bfloat16)
    problem = load_problem(save(tmp_path / name, tensors, ("query", "key", "value")), **OPTIONS)
    assert all(torch.equal(*pair) for pair in zip(problem.inputs, tensors, strict=True))
    wide = load_problem(tmp_path / name, **{**OPTIONS, "dtype": torch.float32})
    assert wide.dtype == torch.float32 and torch.equal(wide.q, tensors[0].float())


def test_a_tuple_without_a_batch_will_do(tmp_path):
    q, k, v = call(batch=1)
    torch.save((q[0], k[0], v[0]), tmp_path / "call.pt")
    assert load_problem(tmp_path / "call.pt", **OPTIONS).q.shape == q.shape


def test_peers_and_checks_take_cross_attention_and_grouped_heads(tmp_path):
    problem = load_problem(save(tmp_path / "call.pt", call()), **OPTIONS)
    q, k, v = problem.inputs
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(every_row(problem).dense, expected)
    some = some_rows(problem)
    torch.testing.assert_close(some.of(expected).double(), some.dense, rtol=1e-4, atol=1e-5)
    assert torch.equal(CPU_PEERS["dense fp32"].prepare(problem)(), expected)
    assert problem.group == 2 and problem.dense_flops == 2 * 2 * 4 * 200 * 200 / 2 * 40
    small = problem.part(100, 2)
    assert [list(x.shape) for x in small.inputs] == [[1, 2, 100, 24], [1, 1, 100, 24], [1, 1, 100, 16]]


@pytest.mark.skipif(ops.unavailable(torch.device("cpu")) is not None, reason="needs the CPU kernel")
def test_bench_measures_the_file(tmp_path, capsys):
    path = save(tmp_path / "call.pt", call())
    assert main(["bench", "--device", "cpu", "--inputs", str(path), "--causal", "--repeats", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ours = found["rows"][2]
    assert (ours["tokens"], ours["k_len"], ours["head_dim"]) == (200, 330, 24) and ours["milliseconds"] > 0
    assert not any("smooth" in line or "transpose" in line for line in found["words"])
    (measured,) = found["calls"]
    assert (measured["q"], measured["k"], measured["v"]) == ([2, 4, 200, 24], [2, 2, 330, 24], [2, 2, 330, 16])
    assert (measured["dtype"], measured["is_causal"], measured["precision"]) == ("float32", True, "int8")


@pytest.mark.skipif(ops.unavailable(torch.device("cpu")) is not None, reason="needs the CPU kernel")
def test_heads_where_tokens_should_be_are_doubted_and_what_was_measured_is_said(tmp_path, capsys):
    path = save(tmp_path / "call.pt", [x.transpose(1, 2) for x in call(q_heads=2, kv_heads=2, q_len=64, k_len=64)])
    main(["bench", "--device", "cpu", "--inputs", str(path), "--repeats", "1"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Inputs: {path}, q and k [2, 64, 2, 24], v [2, 64, 2, 16], float32, not causal, precision int8." in shown
    assert "64 heads and 2 tokens? The layout must be [batch, heads, tokens, head_dim]" in shown


@pytest.mark.skipif(ops.unavailable(torch.device("cpu")) is not None, reason="needs the CPU kernel")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")], ids=str)
def test_inputs_that_are_not_finite_are_at_fault_and_not_the_kernel(tmp_path, capsys, wrong):
    tensors = call()
    tensors[2][0, 0, 3] = wrong
    path = save(tmp_path / "call.pt", tensors)
    assert main(["bench", "--device", "cpu", "--inputs", str(path), "--repeats", "1", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["verdicts"][0]["outcome"] == "not measured" and "the inputs are at fault" in found["words"][0]


class Trap:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("trapped",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"q": torch.ones(1, 1, 2, 2)}, "has no tensor 'k' or 'key', it has q"),
        (torch.ones(3), "holds a Tensor, not tensors by name"),
        (dict(zip("qkv", call(kv_heads=3), strict=True)), "Hq a multiple of Hkv"),
        (dict(zip("qkv", [x.double() for x in call()], strict=True)), "float32, bfloat16, float16"),
        (dict(zip("qkv", [torch.ones(1, 1, 4, 300)] * 3, strict=True)), "head_dim 300 is not supported"),
        (dict(zip("qkv", [torch.ones(4, 8)] * 3, strict=True)), "wanted are q [B, Hq, Sq, D]"),
        ((*call(), torch.ones(2)), "holds 4 things; allowed are q, k and v. Masks, biases and scales are not measured"),
        (
            dict(zip(("q", "k", "v", "attn_mask", "scale"), (*call(), 1, 2), strict=True)),
            "holds attn_mask, k, q, scale, v",
        ),
        (dict(zip(("q", "k", "v", "query"), (*call(), 1), strict=True)), "each under one name"),
        (Trap(), "cannot be read (UnpicklingError"),
    ],
    ids=["missing", "one tensor", "heads", "dtype", "head dim", "2-D", "a fourth", "mask", "two queries", "code"],
)
def test_what_is_no_attention_call_is_named(tmp_path, capsys, content, words):
    path = tmp_path / "call.pt"
    torch.save(content, path)
    with pytest.raises(InputsError) as caught:
        load_problem(path, **OPTIONS)
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "trapped" not in capsys.readouterr().out


def test_a_broken_file_is_named(tmp_path):
    for name in ("call.pt", "call.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(InputsError, match="cannot be read"):
            load_problem(tmp_path / name, **OPTIONS)
