"""`assert_rewritten` counts, and says why a call stayed dense; docs/testing.md does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparge_compile import Policy
from sparge_compile.testing import assert_rewritten

DOCUMENT = Path(__file__).parents[2] / "docs" / "testing.md"
SHORT = Policy(min_tokens=0)
X = torch.randn(1, 2, 40, 8)


class Two(nn.Module):
    def forward(self, x):
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


def test_the_right_number_passes_and_gives_the_report():
    report = assert_rewritten(Two().eval(), 2, X, policy=SHORT)
    assert [site.name for site in report.rewritten] == ["Two:1", "Two:2"]
    assert_rewritten(Two().train(), 1, x=X, policy=SHORT)
    assert_rewritten(Two().eval(), 0, X, policy=Policy(enabled=False))


def test_another_number_is_an_error_with_the_table_and_every_reason():
    with pytest.raises(AssertionError) as error:
        assert_rewritten(Two().train(), 2, X, policy=SHORT)
    text = str(error.value)
    assert text.startswith("expected 2 attention calls to be rewritten, 1 of 2 were.\n")
    assert "density" in text and re.search(r"dropout is active[^\n]*\n *Two:2", text)
    with pytest.raises(AssertionError, match="expected 1 attention call to be rewritten, 0 of 2 were"):
        assert_rewritten(Two().eval(), 1, X)


def test_the_documents_example_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "test_example.py").write_text("\n".join(blocks))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environment = os.environ | {"CI": "true"}  # hypothesis then draws the same examples each time
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout


def test_importing_the_package_brings_neither_testing_nor_hypothesis():
    program = (
        "import sys, sparge_compile; print('sparge_compile.testing' in sys.modules, 'hypothesis' in sys.modules)\n"
    )
    program += "import sparge_compile.testing; print('hypothesis' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["False", "False", "False"], result.stderr
