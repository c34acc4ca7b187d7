"""README's main job, at a length that a test can afford."""

import re
import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


def test_quickstart_rewrites_every_site_and_recalls_as_dense_does():
    command = [sys.executable, str(QUICKSTART), "--tokens", "8192", "--sequences", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert "2 of 2 attention calls rewritten" in result.stdout
    recall = dict(re.findall(r"^(dense|sparse) +([\d.]+)%", result.stdout, re.MULTILINE))
    assert float(recall["dense"]) > 95
    assert float(recall["sparse"]) >= float(recall["dense"]) - 1
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("blocks.{0-1}.attention x2")]
    density = [float(number) for number in re.findall(r"\d\.\d{3}", row)]
    assert max(density) < 1, "nothing was skipped, so nothing was tested"
