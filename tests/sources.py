"""The project's own files, for tests that start from a fresh copy of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def copy_sources(folder: Path) -> None:
    """Copies them below `folder`: git's where this is a repository; a copy without one has nothing else in it."""
    for path in _sources():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((ROOT / path).read_bytes())


def _sources() -> list[Path]:
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
        return [Path(name) for name in names if (ROOT / name).is_file()]
    made_here = {".venv", ".pytest_cache", ".hypothesis", "__pycache__", "dist", "build"}
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [path for path in paths if not made_here & set(path.parts)]
