"""Tests run in as many processes as there are CPUs, where pytest-xdist is installed and no GPU would be shared.

Random tests draw the same examples each time, so that a failure is the change's; `nox -s nightly` draws others.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if is_worker or not config.pluginmanager.hasplugin("xdist") or torch.cuda.is_available():
        return
    if config.option.numprocesses is None and not config.option.usepdb and config.option.capture != "no":
        config.option.numprocesses = min(os.cpu_count() or 1, 8)
