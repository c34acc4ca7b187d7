"""`python -m sparge_compile`: `doctor` looks for what is wrong here, `bench` measures the user's shapes."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from sparge_compile.command.bench_options import ASK_THE_DOCTOR, add_arguments, check

EXAMPLES = """examples:
  python -m sparge_compile doctor                     is everything in order here? (about 15 seconds)
  python -m sparge_compile doctor --json              the same for scripts; exit status 0: all is well, 1: it is not
  python -m sparge_compile bench                      what the kernel gains on this machine (within a minute)
  python -m sparge_compile bench --tokens 2048 4096 --heads 12 --head-dim 128 --causal
  python -m sparge_compile bench --inputs qkv.safetensors --plot speed.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status. Exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m sparge_compile",
        description="Looks after torch.compile(model, backend='sparge').",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="")
    doctor = commands.add_parser("doctor", help="what is here, what is wrong, and what to do about it")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    bench = commands.add_parser("bench", help="this kernel beside dense attention, at your shapes")
    bench.set_defaults(run=functools.partial(_bench, bench))
    add_arguments(bench)
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    return args.run(args)


def _doctor(args: argparse.Namespace) -> int:
    try:
        from sparge_compile.command.doctor import run

        return run(as_json=args.json)
    except Exception as error:  # a broken machine gets a diagnosis, not a traceback
        from sparge_compile.command import first_aid

        return first_aid.tell(error, args.json)


def _bench(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    check(parser, args)
    try:
        from sparge_compile.command.bench import run
    except KeyboardInterrupt:  # importing torch takes seconds
        return 130
    except Exception as error:  # as above
        words = " ".join(str(error).split())
        print(f"bench cannot start ({type(error).__name__}: {words}); {ASK_THE_DOCTOR}", file=sys.stderr)
        return 1
    return run(parser, args)
