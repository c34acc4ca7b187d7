"""Every example, small: offline, and with --model on a folder that stands for one of the hub."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

import sparge_compile as sparge
from sparge_compile import dynamo

if TYPE_CHECKING:  # each process of the tests would import it for all of them
    from diffusers import DiffusionPipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
LENGTH = 640  # what is to be rewritten here has as many queries and keys, what is to stay dense has fewer


@pytest.fixture
def load_example(monkeypatch):
    """Imports an example as `python examples/NAME.py` would."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(monkeypatch):
    """The rewritten graphs run as they are: Inductor takes its time, and other tests have it."""
    monkeypatch.setattr(dynamo, "compile_with_inductor", lambda gm, *_: gm.forward)


def run(example: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the example prints, as in a process of its own."""
    torch._dynamo.reset()
    capsys.readouterr()
    with sparge.rewriting(min_tokens=LENGTH):  # the default depends on the machine
        example.main([str(argument) for argument in (*arguments, "--rounds", 1)])
    return capsys.readouterr().out


def check(printed: str, rewritten: str) -> None:
    """Does it say what was rewritten, how long both took, how far apart they are, and whether it pays?"""
    assert f"{rewritten} attention calls rewritten" in printed
    assert len(re.findall(r"^(?:dense|sparse) +[\d.]+ s", printed, re.MULTILINE)) == 2
    error, cosine = re.findall(r"relative L1 of the outputs ([\d.]+), least cosine of a row ([\d.]+)", printed)[0]
    assert float(error) < 0.05 and float(cosine) > 0.95
    assert re.search(r"^sparse is (NOT faster here: )?[\d.]+ times as fast as dense", printed, re.MULTILINE)


def test_transformer_encoder(load_example, capsys):
    arguments = ["--tokens", LENGTH, "--layers", 1, "--width", 128, "--causal"]
    check(run(load_example("transformer_encoder"), capsys, *arguments), "1 of 1")


@pytest.mark.usefixtures("without_inductor")
def test_transformers_prefill(load_example, capsys, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    example = load_example("transformers_prefill")
    printed = run(example, capsys, "--tokens", LENGTH, "--layers", 1, "--new-tokens", 3)
    check(printed, "1 of 1")
    assert "Random weights" in printed and f"{LENGTH} x {LENGTH}" in printed
    assert "a decoding step: 0 of 1 attention calls rewritten" in printed and f"1 x {LENGTH + 1}" in printed
    decoded = re.findall(r"^decoded after a (?:sparse|dense) prefill +\[(.*)\]", printed, re.MULTILINE)
    assert len(decoded) == 2 and all(len(tokens.split(", ")) == 3 for tokens in decoded)

    words = Tokenizer(models.WordLevel({"?": 0, "to": 1, "be": 2, "or": 3, "not": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=5, **sizes)).save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 150)
    arguments = ["--model", tmp_path, "--text", text, "--new-tokens", 2]
    printed = run(example, capsys, *arguments, "--tokens", 700)
    check(printed, "1 of 1")
    assert "Random weights" not in printed and "700 x 700" in printed
    with pytest.raises(SystemExit, match="has 900 tokens: lower --tokens or name a longer --text"):
        run(example, capsys, *arguments, "--tokens", 901)


@pytest.mark.usefixtures("without_inductor")
def test_vit_high_resolution(load_example, capsys, tmp_path):
    from PIL import Image
    from transformers import ViTConfig, ViTModel

    example = load_example("vit_high_resolution")
    printed = run(example, capsys, "--size", 364, "--layers", 1)
    check(printed, "1 of 1")
    assert "Random weights" in printed and "677 x 677" in printed

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTModel(ViTConfig(image_size=64, patch_size=8, **sizes)).save_pretrained(tmp_path)
    Image.effect_noise((60, 40), 50).save(tmp_path / "photo.png")
    printed = run(example, capsys, "--model", tmp_path, "--image", tmp_path / "photo.png", "--size", 208)
    check(printed, "1 of 1")
    assert "Random weights" not in printed and "677 x 677" in printed


@pytest.mark.usefixtures("without_inductor")
def test_diffusers_video(load_example, capsys, tmp_path):
    example = load_example("diffusers_video")
    sizes = ["--frames", 9, "--height", 256, "--width", 256, "--steps", 2, "--layers", 2]  # 3 x 16 x 16 tokens
    profile = tmp_path / "profile.json"
    printed = run(example, capsys, *sizes, "--blocks", "--profile", profile)
    check(printed, "2 of 4")
    assert "Random weights" in printed and re.search(r"blocks\.\{0-1\}\.attn1 x2 +attached ", printed)
    assert sorted(sparge.Profile.load(profile).sites) == ["blocks.0.attn1", "blocks.1.attn1"]

    save_ltx_pipeline(example.random_pipeline(1), tmp_path / "pipeline")
    sizes = ["--frames", 17, "--height", 512, "--width", 512, "--steps", 2]  # as many tokens
    printed = run(example, capsys, *sizes, "--whole", "--model", tmp_path / "pipeline")
    check(printed, "1 of 2")
    assert "Random weights" not in printed and printed.count("rule full") == 1


def save_ltx_pipeline(wan: DiffusionPipeline, folder: Path) -> None:
    """LTX with random weights and Wan's text encoder: to load Wan itself, diffusers needs accelerate."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    LTXPipeline(
        FlowMatchEulerDiscreteScheduler(),
        AutoencoderKLLTXVideo(
            latent_channels=16,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        wan.text_encoder,
        wan.tokenizer,
        LTXVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=32,
            cross_attention_dim=64,
            caption_channels=64,
        ),
    ).save_pretrained(folder)


def test_export_aoti(load_example, capsys):
    printed = run(load_example("export_aoti"), capsys, "--tokens", 1100)
    ran = re.findall(r"(\d+) tokens: (sparse|dense).* in a fresh process the same to the bit", printed)
    assert ran == [("1100", "sparse"), ("551", "dense"), ("100", "dense")]
    assert "times as fast as dense" in printed


def test_in_turn_after_one_run_each_and_what_is_said_of_it(load_example):
    measure = load_example("measure")
    runs = []

    def dense():
        runs.append("dense")
        return torch.tensor([[1.0, 0.0], [1.0, 1.0]])

    def sparse():
        runs.append("sparse")
        return torch.tensor([[1.0, 0.0], [1.0, -1.0]])

    comparison = measure.compare(dense, sparse, rounds=2)
    assert runs == ["dense", "sparse"] * 3
    assert comparison.relative_l1 == pytest.approx(2 / 3) and comparison.least_cosine == pytest.approx(0)


@pytest.mark.parametrize(
    ("sparse_seconds", "said"),
    [
        ([1.0, 1.0, 1.0], "sparse is 2.00 times as fast as dense (between 2.00 and 2.00)"),
        ([1.0, 1.0, 2.5], "not in every round"),
        ([2.5, 2.5, 1.0], "NOT faster here: 0.80 times"),
    ],
    ids=["always", "mostly", "seldom"],
)
def test_it_is_said_whether_sparse_pays(load_example, sparse_seconds, said):
    one = torch.ones(1, 1)
    assert said in str(load_example("measure").Comparison(one, one, [2.0, 2.0, 2.0], sparse_seconds))
