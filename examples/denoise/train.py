"""Train the denoiser on windows of procedural scenes: `python train.py`. Goes on from its checkpoint if interrupted.

Each step takes a few scenes of 512 x 512 pixels and, of each, one or several square windows: all tokens of a scene's
windows attend to one another, at their true distances, so a thousand tokens teach what lies a whole picture apart.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from model import WEIGHTS_PATH, Denoiser, load_pretrained, save_weights
from scenes import FIRST_TEST_SEED, NOISE, add_noise, scene
from torch import Tensor

SCENE_SIDE = 512
POOL = 64  # scenes kept
STEPS_PER_SCENE = 4  # one of them is replaced in so many steps


@dataclass(frozen=True)
class Stage:
    """Part of the curriculum, up to the share `until` of the training time: (windows, tokens a side) to choose from."""

    until: float
    layouts: tuple[tuple[int, int], ...]


CURRICULUM = (
    Stage(0.4, ((1, 16), (1, 20), (4, 8), (4, 10))),
    Stage(0.85, ((1, 24), (4, 12), (9, 8), (1, 32), (4, 16))),
    Stage(1.0, ((1, 32), (4, 16), (4, 24), (16, 12), (1, 48), (16, 16))),
)


class Scenes:
    """A pool of training scenes that slowly changes; its seeds stay below the test scenes'."""

    def __init__(self, seed: int, size: int = POOL) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.next_seed, self.size = seed * 100_000, size
        self.pool: list[Tensor] = []

    def draw(self, count: int) -> list[Tensor]:
        """`count` clean scenes [3, 512, 512]."""
        while len(self.pool) < self.size:
            self._add()
        if torch.rand((), generator=self.generator) < 1 / STEPS_PER_SCENE:
            self.pool.pop(0)
            self._add()
        chosen = torch.randint(len(self.pool), (count,), generator=self.generator)
        return [self.pool[int(index)] for index in chosen]

    def _add(self) -> None:
        assert self.next_seed < FIRST_TEST_SEED, "training would draw a test scene"
        self.pool.append(scene(self.next_seed, SCENE_SIDE))
        self.next_seed += 1


@dataclass(frozen=True)
class Batch:
    """Windows of several scenes: noisy and clean [scenes * windows, 3, side, side], corners [scenes, windows, 2]."""

    noisy: Tensor
    clean: Tensor
    corners: Tensor


def draw_batch(scenes: Scenes, progress: float, tokens_per_step: int) -> Batch:
    """A batch of the stage that `progress` (0 .. 1) falls in."""
    generator = scenes.generator
    stage = next(stage for stage in CURRICULUM if progress <= stage.until)
    windows, side = stage.layouts[int(torch.randint(len(stage.layouts), (), generator=generator))]
    count = max(1, tokens_per_step // (windows * side**2))
    corners = torch.randint(SCENE_SIDE // 4 - side + 1, (count, windows, 2), generator=generator)
    noisy, clean = [], []
    for picture, places in zip(scenes.draw(count), corners, strict=True):
        # One noise for the picture: windows may overlap, and must not show a pixel twice with different noise.
        noise = NOISE * torch.randn(picture.shape, generator=generator)
        for row, column in (places * 4).tolist():
            part = (slice(None), slice(row, row + 4 * side), slice(column, column + 4 * side))
            clean.append(picture[part])
            noisy.append(picture[part] + noise[part])
    return Batch(torch.stack(noisy), torch.stack(clean), corners)


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for everything else, on one schedule."""

    def __init__(self, model: Denoiser, learning_rate: float) -> None:
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        sharpness = [block.attention.sharpness for block in model.blocks]
        special = {id(p) for p in (*matrices, *sharpness)}
        rest = [p for p in model.parameters() if id(p) not in special]
        groups = [{"params": rest}, {"params": sharpness, "lr": 10 * learning_rate}]
        self.all = (
            torch.optim.Muon(matrices, lr=10 * learning_rate, weight_decay=0.01, adjust_lr_fn="original"),
            torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.full = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]

    def step(self, factor: float) -> None:
        """A step at `factor` times the full learning rates."""
        for optimizer, full in zip(self.all, self.full, strict=True):
            for group, rate in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = rate * factor
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.all:
            optimizer.zero_grad()


def learning_rate_factor(step: int, progress: float) -> float:
    """Linear warm-up over 50 steps; a cosine down to 2 % as the time runs out."""
    return min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def psnr(image: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, for a range of 1."""
    return -10 * math.log10(F.mse_loss(image.clamp(0, 1), clean).item())


class Clock:
    """Wall and CPU seconds of this training, those before an interruption included."""

    def __init__(self, wall: float = 0.0, cpu: float = 0.0) -> None:
        self.start = (time.perf_counter() - wall, time.process_time() - cpu)

    def read(self) -> tuple[float, float]:
        """(wall, cpu)."""
        return time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def train(arguments: argparse.Namespace) -> Denoiser:
    """Train for `arguments.cpu_minutes` of CPU time (or `arguments.steps` steps); prints a line every 50 steps."""
    torch.manual_seed(arguments.seed)
    model, scenes, step, clock = Denoiser(), Scenes(arguments.seed), 0, Clock()
    optimizers = Optimizers(model, arguments.learning_rate)
    if arguments.checkpoint.exists():
        saved = torch.load(arguments.checkpoint, weights_only=True)
        if saved["options"] != options_of(arguments):
            raise SystemExit(
                f"{arguments.checkpoint} is of another training ({saved['options']}): move it or go on with it"
            )
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers.all, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, scenes.next_seed, clock = saved["step"], saved["next_seed"], Clock(*saved["clock"])
        scenes.generator.manual_seed(scenes.next_seed)
        print(f"goes on from step {step}", flush=True)
    recent: list[float] = []
    while True:
        wall, cpu = clock.read()
        progress = step / arguments.steps if arguments.steps else cpu / (60 * arguments.cpu_minutes)
        if progress >= 1:
            return model
        batch = draw_batch(scenes, progress, arguments.tokens_per_step)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            restored = model(batch.noisy, batch.corners)
        loss = F.smooth_l1_loss(restored.float(), batch.clean, beta=0.1)
        optimizers.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(learning_rate_factor(step, progress))
        recent.append(psnr(restored.detach().float(), batch.clean))
        step += 1
        if step % 50 == 0:
            mean = sum(recent) / len(recent)
            print(f"step {step:5d}  PSNR {mean:.2f} dB  {wall:.0f} s, {cpu:.0f} s of CPU", flush=True)
            recent.clear()
        if step % 200 == 0:
            save_checkpoint(arguments, model, optimizers, step, scenes.next_seed, clock)


def options_of(arguments: argparse.Namespace) -> dict[str, object]:
    """What two halves of one training must have in common."""
    return {name: getattr(arguments, name) for name in ("seed", "tokens_per_step", "learning_rate", "bf16")}


def save_checkpoint(
    arguments: argparse.Namespace, model: Denoiser, optimizers: Optimizers, step: int, next_seed: int, clock: Clock
) -> None:
    """All that an interrupted training needs; written aside first, so that it is never half a file."""
    states = [optimizer.state_dict() for optimizer in optimizers.all]
    state = {"model": model.state_dict(), "optimizers": states, "step": step, "next_seed": next_seed}
    aside = arguments.checkpoint.with_suffix(".new")
    torch.save({**state, "clock": clock.read(), "options": options_of(arguments)}, aside)
    aside.replace(arguments.checkpoint)


@torch.no_grad()
def evaluate(model: Denoiser, side: int, pictures: int) -> None:
    """Print the mean PSNR on test scenes, whole and in crops of 128 x 128 pixels."""
    whole, crops = [], []
    for seed in range(FIRST_TEST_SEED, FIRST_TEST_SEED + pictures):
        clean = scene(seed, side)
        noisy = add_noise(clean, seed)
        whole.append(psnr(model(noisy[None])[0], clean))
        crops.append(psnr(in_crops(model, noisy), clean))
    mean = [sum(values) / pictures for values in (whole, crops)]
    print(f"{side} x {side} pixels, {pictures} pictures: {mean[0]:.2f} dB whole, {mean[1]:.2f} dB in crops", flush=True)


def in_crops(model: Denoiser, noisy: Tensor, side: int = 128) -> Tensor:
    """The picture [3, height, width] restored in crops of `side` pixels that do not see each other."""
    rows = [torch.cat([model(part[None])[0] for part in row.split(side, 2)], 2) for row in noisy.split(side, 1)]
    return torch.cat(rows, 1)


def main() -> None:
    """Train unless asked only to evaluate, save, load again, and print what it restores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-minutes", type=float, default=70, help="CPU time to train for, all threads together")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of AdamW; Muon's is ten times as high")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_PATH)
    parser.add_argument("--checkpoint", type=Path, help="default: beside the weights, named after them")
    parser.add_argument("--evaluate-only", action="store_true")
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 512], help="pixels a side in the evaluation")
    parser.add_argument("--pictures", type=int, default=4, help="test pictures a side")
    arguments = parser.parse_args()
    arguments.checkpoint = arguments.checkpoint or arguments.weights.with_suffix(".checkpoint.pt")
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate_only:
        save_weights(train(arguments), arguments.weights)
        arguments.checkpoint.unlink(missing_ok=True)
    model = load_pretrained(arguments.weights)
    for side in arguments.sides:
        evaluate(model, side, arguments.pictures)


if __name__ == "__main__":
    main()
