"""The devices there are, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from sparge_compile.bench import cpu_target, gpu_target
from sparge_compile.bench.target import Target
from sparge_kernels import ops

Targets = Mapping[str, Callable[[], Target]]
TARGETS: dict[str, Callable[[], Target]] = {"cpu": cpu_target.target, "cuda": gpu_target.target}


class KernelUnavailable(RuntimeError):
    """The device is here, its kernel cannot run; the message says why."""


def find(device: str, targets: Targets = TARGETS) -> Target:
    """The target of this name. May build the CPU kernel: some seconds, once.

    Raises:
        ValueError: there is no such device, or none here.
        KernelUnavailable: its kernel cannot run here.
    """
    if device not in targets:
        raise ValueError(f"--device {device}: nothing is registered for it; there is {', '.join(targets)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda: torch {torch.__version__} finds no GPU here (torch.cuda.is_available() is False)."
        )
    target = targets[device]()
    try:
        reason = ops.unavailable(target.device)
    except ValueError as error:  # SPARGE_CPU_KERNEL names no kernel
        reason = str(error)
    if reason:
        raise KernelUnavailable(f"the kernel cannot run: {reason}")
    return target
