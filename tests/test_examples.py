"""Every example, small: offline, and with --model on a folder that stands for one of the hub."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sparge_compile as sparge
from sparge_compile import dynamo
from sparge_kernels import ops

if TYPE_CHECKING:  # each process of the tests would import it for all of them
    from diffusers import DiffusionPipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
LENGTH = 640  # what is to be rewritten here has as many queries and keys, what is to stay dense has fewer

pytestmark = pytest.mark.filterwarnings(  # what an example must not show its user
    "error:sparge:UserWarning", "error:.*nested_tensor:UserWarning", "error:.*past_key_values:FutureWarning"
)


@dataclass
class Ran:
    """What an example printed, and how many calls ran sparse in each run of the two that it compared."""

    printed: str
    sparse_calls: dict[str, list[int]]


@pytest.fixture
def load_example(monkeypatch):
    """Imports an example as `python examples/NAME.py` would."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module
    torch._dynamo.reset()


@pytest.fixture
def run(load_example, capsys, monkeypatch):
    """Runs an example as in a process of its own, one round of it."""

    def run(name: str, *arguments: object) -> Ran:
        example = load_example(name)
        calls: dict[str, list[int]] = {"dense": [], "sparse": []}
        compare = load_example("measure").compare

        def counting(run: Callable[[], torch.Tensor], counts: list[int]) -> Callable[[], torch.Tensor]:
            def counted() -> torch.Tensor:
                with ops.record_stats() as records:
                    output = run()
                counts.append(sum(record.ran == "sparse" for record in records))
                return output

            return counted

        def counting_compare(dense, sparse, *rest: Any, **keywords: Any):
            return compare(counting(dense, calls["dense"]), counting(sparse, calls["sparse"]), *rest, **keywords)

        monkeypatch.setattr(example, "compare", counting_compare)
        torch._dynamo.reset()
        capsys.readouterr()
        # The default of min_tokens depends on the machine.
        example.main([str(argument) for argument in ("--rounds", 1, "--min-tokens", LENGTH, *arguments)])
        return Ran(capsys.readouterr().out, calls)

    return run


@pytest.fixture
def without_inductor(monkeypatch):
    """The rewritten graphs run as they are: Inductor takes its time, and other tests have it."""
    monkeypatch.setattr(dynamo, "compile_with_inductor", lambda gm, *_: gm.forward)


def check(ran: Ran, rewritten: str, sparse_calls: int) -> None:
    """Did dense and sparse run so, and is it said what was rewritten, how long both took, how far apart they are?"""
    assert ran.sparse_calls == {"dense": [0, 0], "sparse": [sparse_calls] * 2}
    assert f"{rewritten} attention calls rewritten" in ran.printed
    check_comparison(ran.printed)


def check_comparison(printed: str) -> None:
    assert len(re.findall(r"^(?:dense|sparse) +[\d.]+ s", printed, re.MULTILINE)) == 2
    error, cosine = re.findall(r"L1 of the outputs ([\d.]+), least cosine of an output vector ([\d.]+)", printed)[0]
    assert float(error) < 0.05 and float(cosine) > 0.95
    assert re.search(r"^whole (model|pipeline): sparse was [\d.]+ times as fast as dense", printed, re.MULTILINE)


def test_transformer_encoder(run):
    ran = run("transformer_encoder", "--tokens", LENGTH, "--layers", 1, "--width", 64, "--causal")
    check(ran, "1 of 1", sparse_calls=1)


@pytest.mark.usefixtures("without_inductor")
def test_transformers_prefill(run, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    ran = run("transformers_prefill", "--tokens", LENGTH, "--layers", 1, "--new-tokens", 3)
    check(ran, "1 of 1", sparse_calls=1)
    assert "Random weights" in ran.printed and f"{LENGTH} x {LENGTH}" in ran.printed
    assert re.search(r"^model\.layers\.0\.self_attn ", ran.printed, re.MULTILINE)
    assert "of the last 128 positions" in ran.printed
    assert "a decoding step: 0 of 1 attention calls rewritten" in ran.printed and f"1 x {LENGTH + 1}" in ran.printed
    decoded = re.findall(r"^decoded after a (?:sparse|dense) prefill +\[(.*)\]", ran.printed, re.MULTILINE)
    assert len(decoded) == 2 and all(len(tokens.split(", ")) == 3 for tokens in decoded)

    words = Tokenizer(models.WordLevel({"?": 0, "to": 1, "be": 2, "or": 3, "not": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=5, **sizes)).save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 150)
    arguments = ["--model", tmp_path, "--text", text, "--new-tokens", 2]
    ran = run("transformers_prefill", *arguments, "--tokens", 100, "--min-tokens", 100)
    check(ran, "1 of 1", sparse_calls=1)
    assert "Random weights" not in ran.printed and "100 x 100" in ran.printed
    assert "of the last 100 positions" in ran.printed
    with pytest.raises(SystemExit, match="has 900 tokens: lower --tokens or name a longer --text"):
        run("transformers_prefill", *arguments, "--tokens", 901)


@pytest.mark.usefixtures("without_inductor")
def test_vit_high_resolution(run, tmp_path):
    from PIL import Image
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    ran = run("vit_high_resolution", "--size", 364, "--layers", 1)
    check(ran, "1 of 1", sparse_calls=1)
    assert "Random weights" in ran.printed and "677 x 677" in ran.printed

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTModel(ViTConfig(image_size=64, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    Image.effect_noise((60, 40), 50).save(tmp_path / "photo.png")
    arguments = ["--model", tmp_path / "vit", "--image", tmp_path / "photo.png"]
    ran = run("vit_high_resolution", *arguments, "--size", 208)
    check(ran, "1 of 1", sparse_calls=1)
    assert "Random weights" not in ran.printed and "677 x 677" in ran.printed
    with pytest.raises(SystemExit, match="--size 210: must be a multiple of the model's patch, 8 pixels"):
        run("vit_high_resolution", *arguments, "--size", 210)

    BertModel(BertConfig(vocab_size=5, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(SystemExit, match="bert: takes input_ids, no pictures"):
        run("vit_high_resolution", "--model", tmp_path / "bert")


def test_a_photo_is_normalized_as_its_model_says(load_example, tmp_path):
    from PIL import Image
    from transformers import ViTImageProcessor

    example = load_example("vit_high_resolution")
    Image.new("RGB", (9, 7), "white").save(tmp_path / "photo.png")
    ViTImageProcessor(image_mean=[0.5, 0.5, 0.0], image_std=[0.5, 0.25, 0.5]).save_pretrained(tmp_path / "model")
    (tmp_path / "without").mkdir()

    def colour(model: Path | None) -> list[float]:
        pixels = example.photo(Namespace(image=tmp_path / "photo.png", size=8, model=model))
        assert pixels.shape == (1, 3, 8, 8)
        return pixels[0, :, 0, 0].tolist()

    assert colour(tmp_path / "model") == pytest.approx([1, 2, 2])
    imagenet = pytest.approx([2.249, 2.429, 2.640], abs=0.001)
    assert colour(None) == imagenet and colour(tmp_path / "without") == imagenet


@pytest.mark.usefixtures("without_inductor")
def test_diffusers_video(run, load_example, monkeypatch, tmp_path):
    example = load_example("diffusers_video")
    explained, calibrated = [], []  # the time steps of the calls
    explain, calibrate = sparge.explain, sparge.calibrate

    def note_explained(model: torch.nn.Module, **call: Any) -> sparge.Report:
        explained.append(call["timestep"].flatten()[0].item())
        return explain(model, **call)

    def note_calibrated(model: torch.nn.Module, calls: list[dict[str, Any]], **keywords: Any) -> sparge.Profile:
        calibrated.extend(call["timestep"].flatten()[0].item() for call in calls)
        return calibrate(model, calls, **keywords)

    monkeypatch.setattr(sparge, "explain", note_explained)
    monkeypatch.setattr(sparge, "calibrate", note_calibrated)
    steps = ["--steps", 3, "--dense-steps", 1]
    sizes = ["--frames", 9, "--height", 256, "--width", 256, "--layers", 2]  # 3 x 16 x 16 tokens
    profile = tmp_path / "new" / "profile.json"
    ran = run("diffusers_video", *sizes, *steps, "--blocks", "--profile", profile)
    check(ran, "2 of 4", sparse_calls=2 * 2 * 2)  # sparse steps, calls with and without the prompt, layers
    assert "Random weights" in ran.printed and re.search(r"blocks\.\{0-1\}\.attn1 x2 +attached ", ran.printed)
    assert sorted(sparge.Profile.load(profile).sites) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert [path.name for path in profile.parent.iterdir()] == ["profile.json"]
    scheduler = example.random_pipeline(1).scheduler
    scheduler.set_timesteps(3)
    _, second, third = scheduler.timesteps.tolist()
    assert explained == [second] and calibrated == [second, second, third, third]

    save_ltx_pipeline(example.random_pipeline(1), tmp_path / "pipeline")
    sizes = ["--frames", 17, "--height", 512, "--width", 512]  # as many tokens
    ran = run("diffusers_video", *sizes, *steps, "--whole", "--model", tmp_path / "pipeline")
    check(ran, "1 of 2", sparse_calls=2)  # both ways of the prompt in one batch
    assert "Random weights" not in ran.printed
    assert len(re.findall(r"^\S+ +default ", ran.printed, re.MULTILINE)) == 1
    assert explained[1] < 1000


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


@pytest.mark.parametrize(("version", "keyword"), [("0.40.1", "torch_dtype"), ("0.42.0.dev0", "dtype")])
def test_a_pipeline_gets_its_dtype_and_is_refused_if_it_has_two_transformers(
    load_example, monkeypatch, version, keyword
):
    import diffusers

    given: dict[str, Any] = {}
    pipe = SimpleNamespace(transformer="one", transformer_2=None)
    monkeypatch.setattr(diffusers, "__version__", version)
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", lambda _, **keywords: given.update(keywords) or pipe
    )
    load = load_example("diffusers_video").load
    assert load("folder", "cpu") is pipe and given == {keyword: torch.float32}
    pipe.transformer_2 = "two"
    with pytest.raises(SystemExit, match="--model folder: SimpleNamespace has no transformer or two"):
        load("folder", "cpu")


def test_export_aoti(run, tmp_path):
    package = tmp_path / "new" / "layer.pt2"
    ran = run("export_aoti", "--tokens", 1100, "--out", package)
    assert ran.sparse_calls == {"dense": [0, 0], "sparse": [1, 1]}
    found = re.findall(r"(\d+) tokens: (sparse|dense).* in a fresh process the same to the bit", ran.printed)
    assert found == [("1100", "sparse"), ("551", "dense"), ("100", "dense")]
    check_comparison(ran.printed)
    assert package.exists() and f"saved {package}" in ran.printed


SMALL = {
    "transformer_encoder": ["--tokens", 64, "--layers", 1, "--width", 64],
    "transformers_prefill": ["--tokens", 64, "--layers", 1],
    "vit_high_resolution": ["--size", 56, "--layers", 1],
    "diffusers_video": ["--frames", 1, "--height", 32, "--width", 32, "--steps", 2, "--layers", 1],
}


@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_compared_where_nothing_was_rewritten(name, run):
    with pytest.raises(SystemExit) as stopped:
        run(name, *SMALL[name])
    message = str(stopped.value)
    assert message.startswith("No attention call was rewritten, so there is nothing to compare:\n")
    assert f"min_tokens is {LENGTH}" in message and "pass --min-tokens N" in message


def test_the_quickstart_stops_where_nothing_was_rewritten_too():
    command = [sys.executable, EXAMPLES / "quickstart.py", "--tokens", "512", "--sequences", "1"]
    stopped = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert stopped.returncode == 1 and "No attention call was rewritten" in stopped.stderr
    assert "sequences" not in stopped.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("transformer_encoder", "--rounds 0", "--rounds: 0: must be 1 or more"),
        ("transformer_encoder", "--width 100", "--width: 100: must be a positive multiple of 64, such as 128"),
        ("transformer_encoder", "--width 32", "such as 64"),
        ("transformers_prefill", "--tokens 0", "--tokens: 0"),
        ("transformers_prefill", "--new-tokens 0", "--new-tokens: 0"),
        ("vit_high_resolution", "--size -14", "--size: -14"),
        ("diffusers_video", "--steps 0", "--steps: 0"),
        ("diffusers_video", "--steps 2 --dense-steps 2", "--dense-steps 2: must be 0 or more and less than --steps 2"),
        ("diffusers_video", "--dense-steps -1", "--dense-steps -1: must be 0 or more"),
        ("diffusers_video", "--width 100", "multiple of 16"),
        ("export_aoti", "--tokens 639", "--tokens 639: must not be less than --min-tokens 640"),
        ("export_aoti", "--tokens 640 --out layer.bin", "--out layer.bin: the name must end in .pt2"),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)
def test_arguments_that_cannot_be_are_refused_at_once(name, arguments, said, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(name, *arguments.split())
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_in_turn_after_one_run_each_and_what_is_said_of_it(load_example):
    measure = load_example("measure")
    runs = []

    def dense():
        runs.append("dense")
        return torch.tensor([[1.0, 0.0], [1.0, 1.0]])

    def sparse():
        runs.append("sparse")
        time.sleep(0.05)
        return torch.tensor([[1.0, 0.0], [1.0, -1.0]]) * 2

    comparison = measure.compare(dense, sparse, rounds=3)
    assert runs == ["dense", "sparse", "dense", "sparse", "sparse", "dense", "dense", "sparse"]
    assert len(comparison.dense_seconds) == len(comparison.sparse_seconds) == 3
    assert sorted(comparison.sparse_seconds)[1] > 0.05 > sorted(comparison.dense_seconds)[1]
    assert comparison.relative_l1 == pytest.approx(5 / 3) and comparison.least_cosine == pytest.approx(0)


@pytest.mark.parametrize(
    ("sparse_seconds", "said"),
    [
        ([1.0, 1.0, 1.0], "whole model: sparse is 2.00 times as fast as dense (between 2.00 and 2.00)"),
        ([1.0, 1.0, 2.5], "not in every round"),
        ([2.5, 2.5, 1.0], "sparse is NOT faster here, 0.80 times"),
        ([1.99, 2.01, 1.0], "no difference, sparse is 1.01 times"),
        ([2.03, 2.03, 2.03], "no difference, sparse is 0.99 times"),
        ([1.0], "sparse was 2.00 times as fast as dense in the one round; one is too few to tell"),
    ],
    ids=["always", "mostly", "seldom", "alike", "nearly alike", "once"],
)
def test_it_is_said_whether_sparse_pays(load_example, sparse_seconds, said):
    one = torch.ones(1, 1)
    dense_seconds = [2.0] * len(sparse_seconds)
    assert said in str(load_example("measure").Comparison(one, one, dense_seconds, sparse_seconds))
