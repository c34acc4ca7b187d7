"""`bench` on a clock of the tests' own."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace

import torch

from sparge_compile.bench import cpu_target
from sparge_compile.bench.timing import Timing
from sparge_compile.command import bench
from sparge_compile.command.bench_options import add_arguments

SMALL = ("--device", "cpu", "--tokens", "256", "--heads", "2", "--head-dim", "32", "--repeats", "3")
VARIANTS = ("dense fp32", "dense bf16", "ours", "ours, all tiles")


def run(*arguments, seconds=(1.0, 0.8, 0.2, 0.4), probe=0.0, peers=None):
    """The exit status, with what each of VARIANTS takes, and the first look at dense attention."""

    def target():
        clock = itertools.cycle((probe, *seconds))

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
    """What was printed as JSON, which has no NaN and no infinity."""
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: 1 / 0)
