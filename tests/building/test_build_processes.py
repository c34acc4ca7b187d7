"""The builder of the native kernel among threads and processes: one build a machine, and a command line."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from build_cases import BUILDING, PARALLEL, PROGRAM, WAITING, files, reason, start, wait_until

from sparge_kernels.cpu import build

pytestmark = pytest.mark.skipif(build.fcntl is None, reason="nothing is built on Windows")


def test_threads_build_once(calls):
    results = []
    threads = [threading.Thread(target=lambda: results.append(build.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [results[0]] * 4
    assert len(calls()) == 1


def test_of_two_processes_one_builds_and_the_other_waits(sources, calls, tmp_path):
    hold, said = tmp_path / "calls.hold", [tmp_path / "said 0", tmp_path / "said 1"]
    hold.touch()
    processes = [start(sources, path) for path in said]
    wait_until(lambda: calls() and any(path.read_text() == WAITING for path in said))
    hold.unlink()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["42\n"] * 2
    assert len(calls()) == 1
    built, waited = sorted((path.read_text() for path in said), key=len, reverse=True)
    assert waited == WAITING and re.fullmatch(BUILDING + r"done in \d+\.\d s\n", built)


def test_a_killed_build_neither_blocks_nor_breaks_the_next(sources, calls, tmp_path, monkeypatch):
    (tmp_path / "calls.hold").touch()
    process = start(sources, tmp_path / "said")
    wait_until(calls)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    build.library_path().with_name("building-half.so").touch()
    orphan = calls()[0]  # the killed build's compiler, which goes on
    try:
        monkeypatch.setenv("CXX", "g++")
        assert build.load().answer() == 42
    finally:
        os.killpg(orphan, signal.SIGKILL)
    assert files() == ["build.log", "lock", "sparge_cpu.so"]


def test_a_build_that_takes_too_long_is_stopped_with_its_children(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "TIMEOUT_SECONDS", 0.5)
    (tmp_path / "calls.hold").touch()
    assert re.search("had not finished after 0.5 s and was stopped.*python -m sparge_kernels", reason())
    (tmp_path / "calls.hold").unlink()
    time.sleep(0.3)
    assert calls() and not (tmp_path / "calls.released").exists()


def test_waiting_for_another_process_ends(monkeypatch):
    monkeypatch.setattr(build, "TIMEOUT_SECONDS", 0.2)
    with build._locked(build.library_path().parent):
        assert re.search("another process still builds it after 0.2 s.*lock. End that process", reason())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_and_no_cpp_extension(sources):
    (sources / "answer.cpp").write_text(PARALLEL)
    program = PROGRAM + "maps = {line.split()[-1] for line in Path('/proc/self/maps').read_text().splitlines()}\n"
    program += "print(len([path for path in maps if 'gomp' in path or 'omp5' in path or 'libomp' in path]))\n"
    program += "print('torch.utils.cpp_extension' in sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", program, str(sources)],
        env={**os.environ, "CXX": "g++"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["42", "1", "False"], done.stderr


def test_the_command_prints_the_path_and_builds_again_only_by_force(self_check, calls, capfd):
    for options, expected in (([], 1), ([], 1), (["--force"], 2)):
        assert build.main(options) == 0
        assert capfd.readouterr().out == f"{build.library_path()}\n"
        assert len(calls()) == expected


def test_the_command_prints_the_reason(self_check, capfd):
    self_check.self_check = lambda library: "it is wrong"
    assert build.main([]) == 1
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.endswith("it is wrong. Set CXX to another compiler, or report it.\n")


def test_the_module_is_a_command():
    command = [sys.executable, "-m", "sparge_kernels.cpu.build", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--force" in done.stdout and done.stderr == ""
