"""Worker threads that each run torch operations on one core.

The blocked kernel is a long sequence of small operations. Torch's own threads meet at a barrier after each, and on a
machine that does anything else one late thread then stalls all (seen: ten times slower under load). Independent
pieces on independent threads never wait for each other; torch releases the GIL inside every operation.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor | None] = {}
_START_SECONDS = 10.0


def run(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all jobs, in order, computed on as many threads as torch uses.

    The first error is raised once no job is running any more. Without threads (one core, an interpreter that is
    shutting down) the jobs run in the caller.
    """
    workers = torch.get_num_threads()
    pool = _pool(workers) if min(workers, len(jobs)) > 1 else None
    if pool is None:
        return [job() for job in jobs]
    inference = torch.is_inference_mode_enabled()
    futures: list[Future[Any]] = []
    try:
        for job in jobs:
            futures.append(pool.submit(_run_job, job, inference))
    except RuntimeError:  # "cannot schedule new futures after shutdown": the interpreter is exiting
        return [future.result() for future in futures] + [job() for job in jobs[len(futures) :]]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # jobs write into the caller's tensors


def _run_job(job: Callable[[], Any], inference: bool) -> Any:
    # Grad and inference mode belong to a thread; the caller's do not reach this one.
    with torch.inference_mode(inference), torch.no_grad():
        return job()


def _pool(workers: int) -> ThreadPoolExecutor | None:
    with _lock:
        if workers not in _pools:
            _pools[workers] = _start(workers)
        return _pools[workers]


def _start(workers: int) -> ThreadPoolExecutor | None:
    """A pool whose threads use one core each; None if the system gives no threads.

    `torch.set_num_threads` acts on the calling thread, and on every thread that uses torch for the first time later.
    So the workers set it to 1 and the caller sets it back: a thread that first uses torch in between, while the pool
    starts (once per process and thread count), stays at one core.
    """
    ready = threading.Barrier(workers + 1, timeout=_START_SECONDS)

    def use_one_core() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the number over at its first use of torch: now, not after ready
        ready.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="sparge", initializer=use_one_core)
    try:
        for _ in range(workers):
            pool.submit(int)  # the pool starts a thread per waiting job
        ready.wait()
    except (RuntimeError, threading.BrokenBarrierError):  # "can't start new thread", or it took too long
        ready.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        return None
    finally:
        torch.set_num_threads(workers)
    return pool


def _forget_pools() -> None:
    """A forked child has no threads, and perhaps a lock nobody will release; it starts its own."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
