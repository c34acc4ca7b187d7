"""Restore a noisy picture of 16384 tokens, dense and sparse side by side, and save what is seen as one PNG.

    python examples/denoise/run.py [--out denoise.png] [--size 512] [--topk 0.3] [--profile FILE] [--bf16] [--baselines]

One compiled model runs several ways: dense is the plain Inductor graph, `sparge.rewriting(enabled=False)`; sparse is
the default policy, then `topk`, a fixed share of the tiles, and with --profile thresholds calibrated on other pictures.
On a GPU the picture has 1024 x 1024 pixels, 65536 tokens, and all run under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import sparge_compile as sparge

sys.path.insert(0, str(Path(__file__).parent))
from model import WEIGHTS_PATH, load_pretrained
from picture import Variant, draw, quality
from scenes import FIRST_TEST_SEED, NOISE, add_noise, scene

REPEATS = 3  # timed runs of each variant


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = arguments.size or (1024 if device.type == "cuda" else 512)
    clean = scene(arguments.seed, size)
    noisy = add_noise(clean, arguments.seed)
    compiled = torch.compile(load_pretrained(arguments.weights).to(device), backend="sparge")
    print(f"{size} x {size} pixels, {(size // 4) ** 2} tokens on {device}, torch {torch.__version__}")
    policies = {"default policy": arguments.policy, f"topk={arguments.topk:g}": arguments.fixed_share}
    if arguments.profile is not None:
        policies["calibrated"] = calibrated(compiled, arguments, size, device)

    reports = {}
    for name, policy in policies.items():
        with torch.no_grad(), autocast(device):
            reports[name] = sparge.explain(compiled, noisy[None].to(device), policy=policy, tile_maps=("*",))
        print(f"\n{name}: {reports[name]}", flush=True)
        if not reports[name].rewritten:
            sys.exit("no attention call was rewritten, so there is nothing to compare; see the reasons above")
    print(f"\ncompiling, then {REPEATS} runs of each in turn ...", flush=True)
    dense = sparge.Policy(enabled=False)
    runs = {
        name: partial(restore, compiled, noisy, policy, device) for name, policy in {"dense": dense, **policies}.items()
    }
    if arguments.bf16:
        runs["dense, bfloat16"] = partial(restore, compiled, noisy, dense, device, bf16=True)
    images, seconds = measure(runs)
    variants = [Variant(name, images[name], seconds[name], reports.get(name)) for name in images]
    describe(clean, noisy, variants)
    if arguments.baselines:
        describe_baselines(clean, noisy)
    draw(clean, noisy, variants, arguments.out, where(device))
    print(f"saved {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    """The options, with the two policies they make, and the folder of the picture made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("denoise.png"), help="the picture to write (denoise.png)")
    parser.add_argument("--size", type=int, help="pixels a side, a multiple of 4 (512; 1024 on a GPU)")
    parser.add_argument("--seed", type=int, default=FIRST_TEST_SEED, help="of the scene; training saw those below")
    parser.add_argument("--topk", type=float, default=0.3, help="share of the tiles that the second policy computes")
    parser.add_argument("--profile", type=Path, help="a third: calibrated on two other pictures, and kept in this file")
    parser.add_argument("--min-tokens", type=int, help="rewrite from this length on; default: the device's")
    parser.add_argument("--bf16", action="store_true", help="also time dense under bfloat16 autocast")
    parser.add_argument("--baselines", action="store_true", help="also print classical denoisers (scikit-image)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_PATH)
    arguments = parser.parse_args()
    try:
        arguments.policy = sparge.Policy(min_tokens=arguments.min_tokens)
        arguments.fixed_share = sparge.Policy(min_tokens=arguments.min_tokens, topk=arguments.topk)
    except ValueError as error:
        parser.error(str(error))
    for file in filter(None, (arguments.out, arguments.profile)):
        file.parent.mkdir(parents=True, exist_ok=True)
    return arguments


def calibrated(
    compiled: Callable[[Tensor], Tensor], arguments: argparse.Namespace, size: int, device: torch.device
) -> sparge.Policy:
    """Thresholds for the default error, from the file or else from the two scenes that follow the one shown."""
    if not arguments.profile.exists():
        seeds = (arguments.seed + 1, arguments.seed + 2)
        inputs = [add_noise(scene(seed, size), seed)[None].to(device) for seed in seeds]
        checkpoint = arguments.profile.with_suffix(".partial")
        with autocast(device):
            sparge.calibrate(compiled, inputs, policy=arguments.policy, checkpoint=checkpoint).save(arguments.profile)
    return sparge.Policy(min_tokens=arguments.min_tokens, profile=arguments.profile)


def where(device: torch.device) -> str:
    """What it ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def autocast(device: torch.device, bf16: bool = False) -> torch.autocast:
    """bfloat16 on a GPU, float32 on a CPU unless asked otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 or device.type == "cuda")


@torch.no_grad()
def measure(runs: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The image of each run, and the median of its seconds.

    They take turns, so that a busy machine hits all alike; their first runs, which compile, are not timed.
    """
    images = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return images, {name: statistics.median(taken) for name, taken in seconds.items()}


def restore(
    compiled: Callable[[Tensor], Tensor], noisy: Tensor, policy: sparge.Policy, device: torch.device, bf16: bool = False
) -> Tensor:
    """The image without its noise, float32 on the CPU."""
    with autocast(device, bf16), sparge.rewriting(policy):
        return compiled(noisy[None].to(device))[0].float().clamp(0, 1).cpu()


def describe(clean: Tensor, noisy: Tensor, variants: Sequence[Variant]) -> None:
    """Prints quality and time of each, and says which is faster than every dense one."""
    print(f"\n{'':16}{'PSNR, dB':>10}{'SSIM':>8}{'seconds':>10}{'times as fast':>15}   against dense: PSNR, SSIM")
    print_row("noisy", quality(noisy, clean))
    dense = variants[0]
    for variant in variants:
        row = f"{variant.seconds:10.2f}{dense.seconds / variant.seconds:15.2f}"
        if variant is not dense:
            psnr, ssim = quality(variant.image, dense.image)
            row += f"{psnr:22.2f}{ssim:8.4f}"
        print_row(variant.name, quality(variant.image, clean), row)
    fastest = min(variant.seconds for variant in variants if variant.report is None)
    for variant in variants:
        if variant.report is not None and variant.seconds > 0.98 * fastest:
            print(f"{variant.name} is NOT faster than dense here; keep it dense at this size")


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


def print_row(name: str, measured: tuple[float, float], rest: str = "") -> None:
    print(f"{name:16}{measured[0]:10.2f}{measured[1]:8.3f}{rest}", flush=True)


if __name__ == "__main__":
    main()
