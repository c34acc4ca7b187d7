"""The denoising example: its scenes, its committed weights dense and sparse, its training and its picture."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparge_compile as sparge
from sparge_compile import dynamo

EXAMPLE = Path(__file__).parents[1] / "examples" / "denoise"
NAMES = ("textures", "scenes", "model", "train", "picture", "run")


@pytest.fixture(scope="module")
def denoise():
    """The example's modules; examples are no package, and others have modules of these names too."""
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(EXAMPLE))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        while str(EXAMPLE) in sys.path:
            sys.path.remove(str(EXAMPLE))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture(scope="module")
def example(denoise):
    """(model, clean, noisy): the committed weights and a test picture of 1024 tokens."""
    seed = denoise.scenes.FIRST_TEST_SEED
    clean = denoise.scenes.scene(seed, 128)
    return denoise.model.load_pretrained(), clean, denoise.scenes.add_noise(clean, seed)


def psnr(image: torch.Tensor, clean: torch.Tensor) -> float:
    return -10 * (image.clamp(0, 1) - clean).square().mean().log10().item()


def test_equal_seeds_give_equal_scenes_and_other_seeds_do_not(denoise):
    first, again, other = (denoise.scenes.scene(seed, 96, 128) for seed in (5, 5, 6))
    assert first.shape == (3, 96, 128) and first.dtype == torch.float32
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.05
    assert first.min() >= 0 and first.max() <= 1
    assert first.std() > 0.05


def test_scenes_refuse_sizes_that_are_no_multiple_of_a_patch(denoise):
    for size in (130, 68):
        with pytest.raises(ValueError, match="multiples of 4, 72 or more"):
            denoise.scenes.scene(0, size)


def test_noise_has_the_deviation_it_claims_and_is_the_same_again(denoise):
    clean = torch.full((3, 128, 128), 0.5)
    noisy = denoise.scenes.add_noise(clean, 3, sigma=0.25)
    assert torch.equal(noisy, denoise.scenes.add_noise(clean, 3, sigma=0.25))
    assert (noisy - clean).std().item() == pytest.approx(0.25, rel=0.02)


def test_weights_are_small_and_match_their_recorded_config(denoise):
    from safetensors import safe_open

    assert denoise.model.WEIGHTS_PATH.stat().st_size < 4e6
    with safe_open(denoise.model.WEIGHTS_PATH, "pt") as file:
        recorded = file.metadata()
    config = denoise.model.DenoiserConfig()
    assert recorded == {name: str(getattr(config, name)) for name in recorded}
    assert recorded["dim"] == str(config.dim)


def test_committed_weights_remove_most_of_the_noise(example):
    model, clean, noisy = example
    assert psnr(model(noisy[None])[0], clean) > psnr(noisy, clean) + 8


def test_windows_of_a_picture_see_one_another_at_their_places(example):
    """Cut in two, a picture is restored as the whole is, as far as the cut is out of the convolutions' reach."""
    model, _, noisy = example
    halves = torch.stack(noisy.split(64, 1))
    whole = model(noisy[None])[0, :, :20]
    right_places = model(halves, torch.tensor([[[0, 0], [16, 0]]]))[0, :, :20]
    wrong_places = model(halves, torch.tensor([[[0, 0], [90, 50]]]))[0, :, :20]
    alone = model(halves)[0, :, :20]
    near, *far = ((other - whole).abs().mean() for other in (right_places, wrong_places, alone))
    assert all(near < other / 2 for other in far)


def test_the_order_of_tokens_changes_nothing_but_rounding(denoise, example, monkeypatch):
    model, _, noisy = example
    by_blocks = model(noisy[None, :, :72, :100])  # 18 x 25 tokens: some blocks are cut
    monkeypatch.setattr(denoise.model.Layout.__init__, "__defaults__", (1,))
    by_rows = model(noisy[None, :, :72, :100])
    assert torch.allclose(by_blocks, by_rows, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"topk": 0.5}], ids=["default policy", "topk=0.5"])
def test_sparse_restores_as_well_as_dense(example, monkeypatch, fields):
    model, clean, noisy = example
    dense = model(noisy[None])[0]
    densities = []

    def attend(q, k, v):
        out, stats = sparge.attention(q, k, v, min_tokens=128, return_stats=True, **fields)
        densities.append(stats.density.mean().item())
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    sparse = model(noisy[None])[0]
    assert len(densities) == model.config.layers
    assert not torch.equal(sparse, dense), "nothing ran sparse"
    assert min(densities) < 0.9 or not fields
    assert (sparse - dense).abs().mean() < 0.02
    assert abs(psnr(sparse, clean) - psnr(dense, clean)) < 0.3


def test_run_prints_its_table_and_saves_a_picture(denoise, tmp_path, monkeypatch, capsys):
    """On the rewritten graphs, but without Inductor: its C++ takes longer than a test may."""
    monkeypatch.setattr(dynamo, "compile_with_inductor", lambda gm, *_: gm.forward)
    picture = tmp_path / "picture.png"
    profile = tmp_path / "new" / "profile.json"
    command = ["run.py", "--size", "96", "--min-tokens", "128", "--out", str(picture), "--profile", str(profile)]
    command += ["--bf16", "--baselines"]
    monkeypatch.setattr(sys, "argv", command)
    denoise.run.main()
    printed = capsys.readouterr().out
    assert printed.count("4 of 4 attention calls rewritten") == 3 and profile.exists()
    names = "dense|dense, bfloat16|default policy|topk=0.3|calibrated|non-local means"
    measured = dict(re.findall(rf"^({names}) +([\d.]+) ", printed, re.MULTILINE))
    assert len(measured) == 6
    against_dense = dict(re.findall(rf"^({names}) +(?:[\d.]+ +){{4}}([\d.]+) +[\d.]+$", printed, re.MULTILINE))
    assert len(against_dense) == 4, "not another image than the dense one"
    assert abs(float(measured["default policy"]) - float(measured["dense"])) < 0.3
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 1e6


def test_quality_is_psnr_and_ssim_of_what_is_shown(denoise):
    clean = torch.full((3, 32, 32), 0.5)
    off = clean + 0.1
    psnr, ssim = denoise.picture.quality(off, clean)
    # Of flat images the mean alone counts: (2 a b + c) / (a^2 + b^2 + c), c = .01^2.
    assert psnr == pytest.approx(20, abs=1e-3) and ssim == pytest.approx((0.6 + 1e-4) / (0.61 + 1e-4), abs=1e-3)
    assert denoise.picture.quality(clean + 9, torch.ones_like(clean))[0] == float("inf")  # clipped to 1


def test_an_impossible_policy_is_refused_at_once(denoise, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--topk", "2"])
    with pytest.raises(SystemExit):
        denoise.run.main()
    assert "topk" in capsys.readouterr().err


def test_training_learns_goes_on_from_its_checkpoint_and_saves_weights(denoise, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(denoise.train, "SCENE_SIDE", 128)
    monkeypatch.setattr(denoise.train, "POOL", 2)
    stages = (denoise.train.Stage(1.0, ((1, 8), (4, 4))),)
    monkeypatch.setattr(denoise.train, "CURRICULUM", stages)
    arguments = SimpleNamespace(
        seed=0, learning_rate=2e-3, checkpoint=tmp_path / "checkpoint.pt", steps=3, tokens_per_step=128, bf16=False
    )
    scenes = denoise.train.Scenes(0, size=2)
    started = denoise.model.Denoiser()
    optimizers = denoise.train.Optimizers(started, 2e-3)
    denoise.train.save_checkpoint(arguments, started, optimizers, 1, scenes.next_seed, denoise.train.Clock())
    arguments.steps = 1  # nothing is left to do, so what was saved comes back
    assert all(map(torch.equal, denoise.train.train(arguments).state_dict().values(), started.state_dict().values()))
    arguments.steps = 3
    before = {name: tensor.clone() for name, tensor in started.state_dict().items()}
    trained = denoise.train.train(arguments)
    assert "goes on from step 1" in capsys.readouterr().out
    arguments.learning_rate = 1e-3
    with pytest.raises(SystemExit, match="of another training"):
        denoise.train.train(arguments)
    changed = [not torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items()]
    assert all(changed), "a parameter was not trained"
    denoise.model.save_weights(trained, tmp_path / "weights.safetensors")
    loaded = denoise.model.load_pretrained(tmp_path / "weights.safetensors")
    noisy = torch.rand(1, 3, 32, 32)
    assert torch.allclose(loaded(noisy), trained(noisy), atol=1e-2)
