"""The figure of run.py: whole images, a part enlarged, the tiles that a few heads kept, density per layer, and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparge_compile as sparge

MAPS_SHOWN = 3
ZOOM = (0.62, 0.22, 0.22)  # top, left and side of the enlarged part, of the image's side
COLOURS = ("#8a97a5", "#7db3d9", "#1b6ca8", "#e08e45")  # of dense and the sparse variants
SKIPPED = "#e8edf2"  # tiles


@dataclass(frozen=True)
class Variant:
    """One way to run the model: its image, float32 [3, height, width] in 0 .. 1, seconds, and report (None: dense)."""

    name: str
    image: Tensor
    seconds: float
    report: sparge.Report | None

    @property
    def densities(self) -> list[float]:
        """Share of tiles computed, by layer; a layer that stayed dense is at 1."""
        assert self.report is not None
        return [1.0 if site.density is None else site.density for site in self.report.sites]


def quality(image: Tensor, reference: Tensor) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of an image against another, clipped to 0 .. 1; [3, height, width] both."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    both = (reference.numpy(), image.clamp(0, 1).numpy())
    return (
        float(peak_signal_noise_ratio(*both, data_range=1.0)),
        float(structural_similarity(*both, data_range=1.0, channel_axis=0)),
    )


def draw(clean: Tensor, noisy: Tensor, variants: Sequence[Variant], path: Path, where: str) -> None:
    """Writes the figure as a PNG of 256 colours: the first of `variants`, which is dense, and the sparse ones."""
    from matplotlib.figure import Figure

    dense, *sparse = (variants[0], *(variant for variant in variants if variant.report is not None))
    sparsest = min(sparse, key=lambda variant: sum(variant.densities))
    figure = Figure(figsize=(15, 13.1), layout="constrained", facecolor="white")
    tokens = clean.shape[1] * clean.shape[2] // 16
    figure.suptitle(
        f'A learned denoiser with {tokens} tokens under torch.compile(model, backend="sparge")',
        fontsize=20,
        weight="bold",
    )
    upper, middle, lower = figure.subfigures(3, 1, height_ratios=(5.8, 3.4, 3.2), hspace=0.02)
    whole = upper.subplots(1, 3)
    ratio = dense.seconds / sparsest.seconds
    show(whole[0], noisy, f"noisy input\n{in_words(noisy, clean)}", size=18)
    show(whole[1], dense.image, f"dense, {dense.seconds:.1f} s\n{in_words(dense.image, clean)}", size=18)
    label = f"{sparsest.name}, {sparsest.seconds:.1f} s ({ratio:.1f}x)\n{in_words(sparsest.image, clean)}"
    show(whole[2], sparsest.image, label, size=18)
    draw_zooms(clean, noisy, (dense, *sparse), middle.subplots(1, 3 + len(sparse)))
    axes = lower.subplots(1, MAPS_SHOWN + 3, width_ratios=(1.3, *[1] * MAPS_SHOWN, 1.1, 1.2))
    draw_difference(dense, sparsest, axes[0])
    draw_tile_maps(sparsest, axes[1 : 1 + MAPS_SHOWN])
    draw_densities(sparse, axes[-2])
    draw_times((dense, *sparse), axes[-1], where)
    save(figure, path)


def in_words(image: Tensor, clean: Tensor) -> str:
    psnr, ssim = quality(image, clean)
    return f"PSNR {psnr:.2f} dB, SSIM {ssim:.3f}"


def show(axes: Any, image: Tensor, label: str, size: float = 13.5) -> None:
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(label, fontsize=size)
    axes.set_axis_off()


def draw_zooms(clean: Tensor, noisy: Tensor, variants: Sequence[Variant], axes: Any) -> None:
    """The same part of every image."""
    top, left, side = (int(part * clean.shape[1]) for part in ZOOM)
    part = (slice(None), slice(top, top + side), slice(left, left + side))
    named = [("noisy", noisy), *((variant.name, variant.image) for variant in variants), ("clean, never shown", clean)]
    for axis, (name, image) in zip(axes, named, strict=True):
        show(axis, image[part], name, size=17)


def draw_difference(dense: Variant, sparse: Variant, axes: Any) -> None:
    """The absolute difference of two images, amplified by a power of two to be visible."""
    difference = (sparse.image - dense.image).abs()
    factor = 2 ** int((1 / difference.quantile(0.99).clamp(min=1 / 256)).log2())
    show(axes, difference * factor, f"|sparse - dense| x {factor}")


def draw_tile_maps(variant: Variant, axes: Any) -> None:
    """The heads at the ends and in the middle of the densities: a cell is 128 queries x 64 keys."""
    from matplotlib.colors import ListedColormap

    assert variant.report is not None
    sites = variant.report.rewritten
    heads = sorted(
        (density, site.name, head) for site in sites for head, density in enumerate(site.head_densities or ())
    )
    places = torch.linspace(0, len(heads) - 1, MAPS_SHOWN).round().int().tolist()
    for axis, place in zip(axes, places, strict=True):
        density, name, head = heads[place]
        tiles = variant.report.tile_map(name, head).numpy()
        colours = ListedColormap([SKIPPED, COLOURS[2]])
        axis.imshow(tiles, cmap=colours, aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        axis.set_title(f"{short(name)} head {head}: {density:.2f}", fontsize=13.5)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel("tiles of 64 keys", fontsize=13)
    axes[0].set_ylabel("tiles of 128 queries", fontsize=13)


def draw_densities(variants: Sequence[Variant], axes: Any) -> None:
    """Share of tiles computed, bars for each layer."""
    assert variants[0].report is not None
    sites, height = variants[0].report.sites, 0.8 / len(variants)
    for place, (variant, colour) in enumerate(zip(variants, COLOURS[1:], strict=False)):
        rows = [row + height * place for row in range(len(sites))]
        bars = axes.barh(rows, variant.densities, height=0.95 * height, color=colour)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=13 if len(variants) < 3 else 11)
    middle = height * (len(variants) - 1) / 2
    axes.set_yticks([row + middle for row in range(len(sites))], [short(site.name) for site in sites], fontsize=13)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3)
    axes.set_xticks([])
    axes.set_title("tiles computed", fontsize=13.5)
    tidy(axes)


def draw_times(variants: Sequence[Variant], axes: Any, where: str) -> None:
    """Seconds of the whole model."""
    seconds = [variant.seconds for variant in variants]
    bars = axes.bar(
        [variant.name.replace(" ", "\n").replace("=", "\n= ") for variant in variants],
        seconds,
        color=COLOURS[: len(variants)],
    )
    axes.bar_label(bars, [f"{taken:.1f} s" for taken in seconds], padding=3, fontsize=14)
    axes.set_ylim(0, max(seconds) * 1.18)
    axes.set_yticks([])
    axes.tick_params(labelsize=13 if len(variants) < 4 else 10, length=0)
    axes.set_title(f"whole model, {where}", fontsize=12)
    tidy(axes)


def tidy(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)


def short(name: str) -> str:
    """`blocks.2.attention` as `layer 2`."""
    return "layer " + name.split(".")[1] if name.startswith("blocks.") else name


def save(figure: Any, path: Path) -> None:
    """A third of the bytes: noise does not compress, but it needs few colours."""
    from io import BytesIO

    from PIL import Image

    content = BytesIO()
    figure.savefig(content, format="png", dpi=100)
    Image.open(content).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT).save(path, "PNG", optimize=True)
