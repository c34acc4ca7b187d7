"""The project's own files, for tests that start from a fresh copy of it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MADE_HERE = {"__pycache__", "dist", "build"}


def copy_sources(folder: Path) -> None:
    """Copies them below `folder`: what git knows; where it knows nothing, all but what is made in such a folder."""
    for path in _sources():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((ROOT / path).read_bytes())


def _sources() -> list[Path]:
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or the checkout is another user's
            names = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split("\0")
            return [Path(name) for name in names if (ROOT / name).is_file()]
    return list(_walk(ROOT))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        hidden = path.name.startswith(".") and path.name != ".ci"
        is_environment = (path / "pyvenv.cfg").exists()
        if path.is_file():
            yield path.relative_to(ROOT)
        elif not (hidden or is_environment or path.suffix == ".egg-info" or path.name in MADE_HERE):
            yield from _walk(path)
