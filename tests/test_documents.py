"""Every block of Python in README, docs and examples runs, each document from its top, as a reader would paste it.

What they tell a reader to type into a shell: test_commands.py.
"""

import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from markdown_it import MarkdownIt
from torch import nn

import sparge_compile as sparge
from sparge_compile.matchers import MATCHERS
from sparge_compile.rules import BREAK_EVEN

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.glob("examples/*/README.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *EXAMPLES]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Transformer(nn.Sequential):
    def compile_repeated_blocks(self, **kwargs):
        for block in self:
            block.compile(**kwargs)


class Pipeline:
    """What a reader has in place of ours: a diffusers pipeline."""

    def __init__(self):
        self.transformer = Transformer(Block(), Block()).eval()

    def __call__(self, prompt, callback_on_step_end):
        for step in range(2):
            self.transformer(torch.randn(1, 256, 32))
            callback_on_step_end(self, step, None, {})


def what_a_reader_has():
    """The names that documents use and do not define: a model, its inputs, a pipeline."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 1024, 16).unbind()
    x = torch.randn(1, 1024, 32)
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "sparge": sparge,
        "model": nn.Sequential(Block(), Block()).eval(),
        "x": x,
        "inputs": [x],
        "batches": [x],
        "q": q,
        "k": k,
        "v": v,
        "pipe": Pipeline(),
        "prompt": "",
        "steps": 2,
        "latents": x,
        "denoise": lambda latents, step: latents,
    }


def blocks_of(document):
    tokens = MarkdownIt().parse(document.read_text())
    return [token for token in tokens if token.type == "fence" and token.info == "python"]


def links_of(document):
    for token in MarkdownIt().enable("table").parse(document.read_text()):
        for child in token.children or ():
            address = child.attrs.get("href") or child.attrs.get("src")
            if address is not None:
                yield address


def name_of(document):
    return document.relative_to(ROOT).with_suffix("").as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    files = [link.partition("#")[0] for link in links_of(document) if "://" not in link]
    assert [file for file in files if file and not (document.parent / file).exists()] == []


@pytest.fixture
def pasted(monkeypatch, tmp_path):
    """The module that a document is pasted into, in a folder to write to; matchers are as they were afterwards.

    The default min_tokens is that of the fastest CPUs, which the documents' lengths are for, on every machine.
    """
    for kind in BREAK_EVEN:
        monkeypatch.setitem(BREAK_EVEN, kind, 1024)
    module = ModuleType("pasted")
    vars(module).update(what_a_reader_has())
    monkeypatch.setitem(sys.modules, "pasted", module)
    monkeypatch.chdir(tmp_path)
    before = list(MATCHERS)
    yield module
    MATCHERS[:] = before
    torch._dynamo.reset()


@pytest.mark.parametrize("document", [x for x in DOCUMENTS if blocks_of(x)], ids=name_of)
def test_every_block_runs(document, pasted, monkeypatch):
    monkeypatch.syspath_prepend(document.parent)  # examples import what lies beside them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks_of(document):
            # Lines are counted from the top of the document, so that an error names the line that is wrong.
            source = "\n" * (block.map[0] + 1) + block.content
            exec(compile(source, str(document), "exec"), vars(pasted))
    if document == ROOT / "README.md":
        assert len(sparge.last_report().rewritten) == 2, sparge.last_report()
