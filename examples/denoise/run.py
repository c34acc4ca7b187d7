"""Restore a noisy picture of 16384 tokens, dense and sparse side by side, and save what is seen as one PNG.

    python examples/denoise/run.py [--out denoise.png] [--size 512] [--seed 1000000] [--topk 0.3] [--baselines]

One compiled model runs both ways: dense is the plain Inductor graph, `sparge.rewriting(enabled=False)`; sparse is the
default policy, or with `--topk` that share of the tiles. On a GPU the picture has 1024 x 1024 pixels, 65536 tokens,
and both run under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import sparge_compile as sparge

sys.path.insert(0, str(Path(__file__).parent))
from model import WEIGHTS_PATH, load_pretrained
from picture import Panels, draw
from scenes import FIRST_TEST_SEED, NOISE, add_noise, scene

REPEATS = 3  # timed runs of each variant


@dataclass(frozen=True)
class Run:
    """One variant: the restored image, float32 [3, height, width] in 0 .. 1, and the median of its seconds."""

    image: Tensor
    seconds: float


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = arguments.size or (1024 if device.type == "cuda" else 512)
    clean = scene(arguments.seed, size)
    noisy = add_noise(clean, arguments.seed)
    model = load_pretrained(arguments.weights).to(device)
    compiled = torch.compile(model, backend="sparge")
    fields = {"topk": arguments.topk, "min_tokens": arguments.min_tokens}
    policy = sparge.Policy(**{name: value for name, value in fields.items() if value is not None})

    with autocast(device):
        report = sparge.explain(compiled, noisy[None].to(device), policy=policy, tile_maps=("*",))
    print(f"{size} x {size} pixels, {(size // 4) ** 2} tokens on {device}, torch {torch.__version__}\n\n{report}\n")
    if not report.rewritten:
        sys.exit("no attention call was rewritten, so there is nothing to compare; see the reasons above")
    print(f"compiling both variants, then {REPEATS} runs of each in turn ...", flush=True)
    dense, sparse = measure(compiled, noisy, policy, device)
    describe(clean, noisy, dense, sparse)
    if arguments.baselines:
        describe_baselines(clean, noisy)
    panels = Panels(clean, noisy, dense.image, sparse.image, dense.seconds, sparse.seconds)
    draw(panels, report, arguments.out, title(size, device, arguments.topk))
    print(f"saved {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("denoise.png"), help="the picture to write (denoise.png)")
    parser.add_argument("--size", type=int, help="pixels a side, a multiple of 4 (512; 1024 on a GPU)")
    parser.add_argument("--seed", type=int, default=FIRST_TEST_SEED, help="of the scene; training saw those below")
    parser.add_argument("--topk", type=float, help="share of the tiles to compute; default: the default policy")
    parser.add_argument("--min-tokens", type=int, help="rewrite from this length on; default: the device's")
    parser.add_argument("--baselines", action="store_true", help="also print classical denoisers (scikit-image)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_PATH)
    return parser.parse_args()


def title(size: int, device: torch.device, topk: float | None) -> str:
    """What the picture shows, in a line."""
    policy = "default policy" if topk is None else f"topk={topk:g}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f'A learned denoiser, {(size // 4) ** 2} tokens, torch.compile(model, backend="sparge"), {policy} ({where})'


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def measure(
    compiled: Callable[[Tensor], Tensor], noisy: Tensor, policy: sparge.Policy, device: torch.device
) -> tuple[Run, Run]:
    """(dense, sparse): both variants in turn, so that noise hits both; the first runs, which compile, are not timed."""
    policies = (sparge.Policy(enabled=False), policy)
    images = [restore(compiled, noisy, chosen, device) for chosen in policies]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for chosen, taken in zip(policies, seconds, strict=True):
            start = time.perf_counter()
            restore(compiled, noisy, chosen, device)
            taken.append(time.perf_counter() - start)
    dense, sparse = (Run(image, statistics.median(taken)) for image, taken in zip(images, seconds, strict=True))
    return dense, sparse


def restore(compiled: Callable[[Tensor], Tensor], noisy: Tensor, policy: sparge.Policy, device: torch.device) -> Tensor:
    """The image without its noise, float32 on the CPU."""
    with autocast(device), sparge.rewriting(policy):
        return compiled(noisy[None].to(device))[0].float().clamp(0, 1).cpu()


def quality(image: Tensor, clean: Tensor) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of an image against another, clipped to 0 .. 1."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    both = (clean.numpy(), image.clamp(0, 1).numpy())
    return (
        float(peak_signal_noise_ratio(*both, data_range=1.0)),
        float(structural_similarity(*both, data_range=1.0, channel_axis=0)),
    )


def describe(clean: Tensor, noisy: Tensor, dense: Run, sparse: Run) -> None:
    """Prints quality and time of both, and says which is faster."""
    print(f"{'':20}{'PSNR, dB':>10}{'SSIM':>8}{'seconds':>10}")
    print_row("noisy", quality(noisy, clean))
    for name, run in (("dense", dense), ("sparse", sparse)):
        print_row(name, quality(run.image, clean), run.seconds)
    print_row("sparse against dense", quality(sparse.image, dense.image))
    ratio = dense.seconds / sparse.seconds
    if ratio > 1.02:
        print(f"sparse is {ratio:.2f} times as fast as dense, whole model")
    else:
        print(f"sparse is NOT faster here: {ratio:.2f} times the speed of dense; keep it dense at this size")


def describe_baselines(clean: Tensor, noisy: Tensor) -> None:
    """Prints classical denoisers, each at the best of five strengths, chosen by looking at the clean picture."""
    from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

    image = noisy.numpy()
    for name, restored in (
        ("total variation", lambda s: denoise_tv_chambolle(image, weight=s * NOISE, channel_axis=0)),
        ("non-local means", lambda s: denoise_nl_means(image, 5, 11, h=s * NOISE, sigma=NOISE, channel_axis=0)),
    ):
        tried = (quality(torch.from_numpy(restored(s)).float(), clean) for s in (0.3, 0.5, 0.7, 1.0, 1.4))
        print_row(name, max(tried))


def print_row(name: str, measured: tuple[float, float], seconds: float | None = None) -> None:
    print(f"{name:20}{measured[0]:10.2f}{measured[1]:8.3f}{'' if seconds is None else f'{seconds:10.2f}'}", flush=True)


if __name__ == "__main__":
    main()
