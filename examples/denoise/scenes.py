"""Procedural scenes: a quilt of panels with balls across their borders, drawn from a seed.

    python examples/denoise/scenes.py --seed 1 --out scene.png

Panels are terrain, stripes, rings, balls, mosaics and pages of glyphs. A scene has two mosaics and one alphabet, used
in several panels: what noise hides in one place can be seen in another, near or far.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from textures import Alphabet, Generator, Image, Mosaic, discs, paint_ball, palette, rings, stripes, terrain
from torch import Tensor

SMALLEST_PANEL = 72  # pixels
GRID = 4  # panels begin and end at multiples of this many pixels
FIRST_TEST_SEED = 1_000_000  # training stays below
NOISE = 0.5  # standard deviation of the noise, in units of the range 0 .. 1


def scene(seed: int, height: int = 512, width: int | None = None) -> Tensor:
    """The scene of this seed: float32 [3, height, width] in 0 .. 1, sRGB. `width` defaults to `height`.

    Raises ValueError when a side is no multiple of 4 or below 72.
    """
    width = height if width is None else width
    if height % GRID or width % GRID or min(height, width) < SMALLEST_PANEL:
        raise ValueError(
            f"a scene of {height} x {width} pixels: sides must be multiples of {GRID}, {SMALLEST_PANEL} or more"
        )
    rng = np.random.default_rng(seed)
    colours = palette(rng)
    frequent = [Mosaic(rng, colours), Alphabet(rng, colours), Mosaic(rng, colours)]
    textures = [*frequent, *frequent, terrain, terrain, stripes, rings, discs]
    image = np.empty((height, width, 3), np.float32)
    image[:] = colours[0] * 0.4
    deck: list = []
    for top, left, bottom, right in _split(rng, 0, 0, height, width):
        deck = deck or list(rng.permutation(np.array(textures, dtype=object)))
        inner = image[top + 2 : bottom - 2, left + 2 : right - 2]
        full = deck.pop()(rng, bottom - top, right - left, colours)
        inner[:] = full[2:-2, 2:-2]
    _scatter_balls(rng, image, colours)
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def _split(rng: Generator, top: int, left: int, bottom: int, right: int) -> list[tuple[int, int, int, int]]:
    """Cuts a rectangle at random into panels (top, left, bottom, right) of at least SMALLEST_PANEL a side."""
    height, width = bottom - top, right - left
    longer = max(height, width)
    if longer < 2 * SMALLEST_PANEL or (longer < 280 and rng.random() < 0.4):
        return [(top, left, bottom, right)]
    cut = int(rng.integers(SMALLEST_PANEL // GRID, (longer - SMALLEST_PANEL) // GRID + 1)) * GRID
    if height >= width:
        halves = [(top, left, top + cut, right), (top + cut, left, bottom, right)]
    else:
        halves = [(top, left, bottom, left + cut), (top, left + cut, bottom, right)]
    return [panel for half in halves for panel in _split(rng, *half)]


def _scatter_balls(rng: Generator, image: Image, colours: Image) -> None:
    """A few balls, about one for every 200 x 200 pixels, anywhere."""
    height, width = image.shape[:2]
    for _ in range(max(1, round(height * width / 200**2))):
        radius = 12 * 4 ** rng.random()
        paint_ball(rng, image, rng.uniform(0, height), rng.uniform(0, width), radius, colours)


def add_noise(clean: Tensor, seed: int, sigma: float = NOISE) -> Tensor:
    """The image with white Gaussian noise of this standard deviation, not clipped; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return clean + sigma * torch.randn(clean.shape, generator=generator)


def main() -> None:
    """Save one scene."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=FIRST_TEST_SEED)
    parser.add_argument("--size", type=int, default=512, help="pixels a side, a multiple of 4")
    parser.add_argument("--noisy", action="store_true", help="with noise")
    parser.add_argument("--out", type=Path, default=Path("scene.png"))
    arguments = parser.parse_args()
    from skimage.io import imsave

    image = scene(arguments.seed, arguments.size)
    if arguments.noisy:
        image = add_noise(image, arguments.seed)
    imsave(arguments.out, (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    main()
