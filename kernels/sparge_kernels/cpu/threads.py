"""Worker threads that each run torch operations on one core.

The blocked kernel is a long sequence of small operations. Torch's own threads meet at a barrier after each, and on a
machine that does anything else one late thread then stalls all (seen: ten times slower under load). Independent
pieces on independent threads never wait for each other; torch releases the GIL inside every operation.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def run(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all jobs, in order, computed on as many threads as torch uses; the first error is raised."""
    workers = min(torch.get_num_threads(), len(jobs))
    if workers <= 1:
        return [job() for job in jobs]
    inference = torch.is_inference_mode_enabled()
    futures = [_pool(torch.get_num_threads()).submit(_run_job, job, inference) for job in jobs]
    return [future.result() for future in futures]


def _run_job(job: Callable[[], Any], inference: bool) -> Any:
    # Grad and inference mode belong to a thread; the caller's do not reach this one.
    with torch.inference_mode(inference), torch.no_grad():
        return job()


def _pool(workers: int) -> ThreadPoolExecutor:
    with _lock:
        if workers not in _pools:
            _pools[workers] = _start(workers)
        return _pools[workers]


def _start(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads use one core each.

    `torch.set_num_threads` acts on the calling thread and on threads that use torch for the first time later; so the
    workers set it to 1, and the caller sets it back before anyone else can notice.
    """
    ready = threading.Barrier(workers + 1)

    def use_one_core() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the number over at its first use of torch: now, not after ready
        ready.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="sparge", initializer=use_one_core)
    for _ in range(workers):
        pool.submit(int)  # the pool starts a thread per waiting job
    ready.wait()
    torch.set_num_threads(workers)
    return pool


def _forget_pools() -> None:
    """A forked child has no threads, and perhaps a lock nobody will release; it starts its own."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
