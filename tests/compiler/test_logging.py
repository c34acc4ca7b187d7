"""The compiler speaks under one logger, `sparge_compile`, when it is asked to; graph diffs have one of their own."""

import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from light import EXACT_FIELDS, Stack, run

import sparge_compile  # noqa: F401
from sparge_compile import Policy, graph_diff

X = torch.randn(1, 6, 16)
POLICY = Policy(**{**EXACT_FIELDS, "dense": ("*.1",)})


def logged(caplog, level, logger="sparge_compile"):
    caplog.clear()
    with caplog.at_level(level, logger):
        run(Stack(2).eval(), X, policy=POLICY)
    return [record for record in caplog.records if record.name.startswith("sparge_compile")]


def test_nothing_is_logged_or_written_down_by_default(caplog, capfd, monkeypatch):
    monkeypatch.setattr(graph_diff, "readable", lambda gm: pytest.fail("a graph is written down, and nobody asked"))
    assert logged(caplog, logging.WARNING) == [] and capfd.readouterr() == ("", "")


def test_no_handler_is_installed():
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "sparge_compile"]
    assert {"sparge_compile", "sparge_compile.graph_diff"} <= set(names)
    assert all(logging.getLogger(name).handlers == [] for name in names)


def test_info_is_one_line_for_each_graph(caplog):
    (record,) = logged(caplog, logging.INFO)
    assert record.getMessage().startswith("1 of 2 attention calls rewritten in ")
    assert " ms, graph of forward (" in record.getMessage() and record.name == "sparge_compile"


def test_debug_is_a_line_for_each_call_with_the_decision(caplog):
    lines = [record.getMessage() for record in logged(caplog, logging.DEBUG) if record.name == "sparge_compile"]
    assert len(lines) == 3 and "blocks.0 (" in lines[1] and "light.py:" in lines[1]
    assert "rewritten, thresholds by policy" in lines[1]
    assert "blocks.1 (" in lines[2] and "dense, the policy keeps it dense" in lines[2]


def test_the_diff_of_a_graph_is_logged_alone_if_only_it_is_asked_for(caplog):
    (record,) = logged(caplog, logging.DEBUG, "sparge_compile.graph_diff")
    removed, added = ([line for line in record.getMessage().splitlines() if line.startswith(sign)] for sign in "-+")
    assert sum("scaled_dot_product_attention(" in line and "code:" not in line for line in removed) == 1
    assert sum("torch.ops.sparge.attention" in line for line in added) == 1
    assert "graph of forward" in removed[0] and removed[0].endswith("before") and added[0].endswith("after")


def test_the_diff_can_be_left_out_of_all_the_rest(caplog):
    graph_diff.log.setLevel(logging.ERROR)
    try:
        assert {record.name for record in logged(caplog, logging.DEBUG)} == {"sparge_compile"}
    finally:
        graph_diff.log.setLevel(logging.NOTSET)


def test_a_graph_without_attention_is_one_line_of_debug(caplog):
    with caplog.at_level(logging.DEBUG, "sparge_compile"):
        run(lambda x: F.relu(x) + 1, X)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("sparge_compile")] == [
        "no attention call in a graph of 4 nodes"
    ]


PROGRAM = """
import torch, sparge_compile
attend = torch.nn.functional.scaled_dot_product_attention
x = torch.randn(1, 2, 6, 8)
sparge_compile.explain(lambda x: attend(x, x, x), x, policy=sparge_compile.Policy(min_tokens=0), timing=False)
"""


def test_torch_logs_switches_on_the_lines_of_graphs_and_their_diffs_apart():
    switch = "sparge_compile,+sparge_compile.graph_diff"
    environment = {**os.environ, "TORCH_LOGS": switch, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    assert "1 of 1 attention calls rewritten" in ran.stderr and "+++ graph of <lambda>" in ran.stderr
    assert "rewritten, thresholds by" not in ran.stderr
