"""The blocked kernel's threads: results do not depend on them, and they leave no trace in the process."""

import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from kernel_cases import blocked_kernel

from sparge_kernels.cpu import threads
from sparge_kernels.thresholds import Thresholds, pack

OPTIONS = {"thresholds": pack([Thresholds(0.4, 0.9, -1.0, None)]), "is_causal": True}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def attend(inputs):
    with blocked_kernel():
        return torch.ops.sparge.attention.default(*inputs, **OPTIONS)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, 700, 32, generator=generator) for _ in range(3))


def test_equal_bits_for_every_thread_count(inputs):
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(attend(inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_thread_count_of_the_process_is_untouched(two_threads, inputs):
    attend(inputs)
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert torch.get_num_threads() == 2
    assert seen == [2]


def test_jobs_run_on_single_core_threads(two_threads):
    assert threads.run([torch.get_num_threads] * 4) == [1] * 4


def test_inference_mode_and_inputs_that_require_grad(two_threads, inputs):
    expected = attend(inputs)
    with torch.inference_mode():
        assert torch.equal(attend(tuple(x.clone() for x in inputs)), expected)
    with torch.no_grad():
        result = attend(tuple(x.clone().requires_grad_() for x in inputs))
    assert torch.equal(result, expected)
    assert not result.requires_grad


def test_error_of_a_job_reaches_the_caller(two_threads):
    def fail():
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        threads.run([int, fail, int])


def test_no_job_runs_after_an_error_is_raised(two_threads):
    ran = []

    def job(number):
        if number == 0:
            raise ZeroDivisionError
        deadline.wait(0.05)
        ran.append(number)

    deadline = threading.Event()
    with pytest.raises(ZeroDivisionError):
        threads.run([partial(job, number) for number in range(40)])
    count = len(ran)
    deadline.wait(0.3)
    assert len(ran) == count < 39


def test_a_call_at_interpreter_exit_runs():
    program = "import atexit, torch; from sparge_kernels.cpu import threads; torch.set_num_threads(2)\n"
    program += "threads.run([int, int]); atexit.register(lambda: print(threads.run([int, int, int])))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[0, 0, 0]", result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_starts_threads_of_its_own(two_threads):
    threads.run([int, int])
    child = os.fork()
    if child == 0:
        os._exit(0 if threads.run([int, int]) == [0, 0] else 1)
    deadline = threading.Event()
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        deadline.wait(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
