"""The figure of run.py: the images, the tiles that a few heads kept, density per layer, and time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import sparge_compile as sparge

MAPS_SHOWN = 3
KEPT, SKIPPED = "#1b6ca8", "#e8edf2"  # colours of tiles, and of sparse and dense bars


@dataclass(frozen=True)
class Panels:
    """Images, float32 [3, height, width] in 0 .. 1 (the noisy one beyond), and seconds of the whole model."""

    clean: Tensor
    noisy: Tensor
    dense: Tensor
    sparse: Tensor
    dense_seconds: float
    sparse_seconds: float


def draw(panels: Panels, report: sparge.Report, path: Path, title: str) -> None:
    """Writes the figure; the ending of `path` says the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.6), layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.12, 1))
    draw_images(panels, upper.subplots(1, 4))
    axes = lower.subplots(1, 3 + MAPS_SHOWN, width_ratios=(1.35, *[1] * MAPS_SHOWN, 1.0, 0.8))
    show(axes[0], panels.clean, "clean (not shown to the model)")
    draw_tile_maps(report, axes[1 : 1 + MAPS_SHOWN])
    draw_densities(report, axes[-2])
    draw_times(panels, report, axes[-1])
    figure.savefig(path, dpi=100)


def draw_images(panels: Panels, axes) -> None:
    """Noisy, dense, sparse, and the difference of the last two, amplified to be visible."""
    from skimage.metrics import peak_signal_noise_ratio as psnr

    difference = (panels.sparse - panels.dense).abs()
    factor = 2 ** int((1 / difference.max().clamp(min=1 / 64)).log2())

    def against(image: Tensor) -> str:
        return f"{psnr(panels.clean.numpy(), image.clamp(0, 1).numpy(), data_range=1.0):.2f} dB"

    show(axes[0], panels.noisy, f"noisy input, {against(panels.noisy)}")
    show(axes[1], panels.dense, f"dense: {against(panels.dense)}, {panels.dense_seconds:.1f} s")
    show(axes[2], panels.sparse, f"sparse: {against(panels.sparse)}, {panels.sparse_seconds:.1f} s")
    mean = difference.mean().item()
    show(axes[3], difference * factor, f"|sparse - dense| x {factor} (mean {mean:.4f})")


def show(axes, image: Tensor, label: str) -> None:
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="antialiased")
    axes.set_title(label, fontsize=14)
    axes.set_axis_off()


def draw_tile_maps(report: sparge.Report, axes) -> None:
    """The heads at the ends and in the middle of the densities: a cell is 128 queries x 64 keys."""
    from matplotlib.colors import ListedColormap

    heads = [
        (density, site.name, head)
        for site in report.rewritten
        for head, density in enumerate(site.head_densities or ())
    ]
    heads.sort()
    places = torch.linspace(0, len(heads) - 1, MAPS_SHOWN).round().int().tolist()
    for axis, place in zip(axes, places, strict=True):
        density, name, head = heads[place]
        tiles = report.tile_map(name, head)
        axis.imshow(
            tiles.numpy(), cmap=ListedColormap([SKIPPED, KEPT]), aspect="auto", interpolation="nearest", vmin=0, vmax=1
        )
        axis.set_title(f"{short(name)}, head {head}: {density:.2f}", fontsize=13)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel("queries, tiles of 128", fontsize=12)
    for axis in axes:
        axis.set_xlabel("keys, tiles of 64", fontsize=12)


def draw_densities(report: sparge.Report, axes) -> None:
    """Share of tiles computed, a bar for each layer; a layer that stayed dense is at 1."""
    densities = [1.0 if site.density is None else site.density for site in report.sites]
    bars = axes.barh(range(len(densities)), densities, color=KEPT)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=12)
    axes.set_yticks(range(len(densities)), [short(site.name) for site in report.sites], fontsize=12)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25)
    axes.set_title("tiles computed", fontsize=14)
    tidy(axes)


def draw_times(panels: Panels, report: sparge.Report, axes) -> None:
    """Seconds of the whole model, dense and sparse; the attention part is darker."""
    seconds = [panels.dense_seconds, panels.sparse_seconds]
    bars = axes.bar(["dense", "sparse"], seconds, color=["#8a97a5", KEPT])
    axes.bar_label(bars, fmt="%.1f s", padding=3, fontsize=13)
    axes.set_ylim(0, max(seconds) * 1.15)
    axes.set_yticks([])
    axes.tick_params(labelsize=13)
    axes.set_title(f"whole model: {seconds[0] / seconds[1]:.2f}x", fontsize=14)
    tidy(axes)


def tidy(axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)


def short(name: str) -> str:
    """`blocks.2.attention` as `block 2`."""
    return "block " + name.split(".")[1] if name.startswith("blocks.") else name
