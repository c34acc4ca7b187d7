"""What fills the panels of a scene: textures with structure at many scales, each drawn from a seeded generator.

Every texture takes (generator, height, width, colours) and returns float32 [height, width, 3] in 0 .. 1. Motifs
(`Mosaic`, `Alphabet`) are drawn once and used in several places of a scene, so what is lost to noise in one place
can be seen in another.
"""

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]  # [height, width, 3], or [height, width] for a single field
Generator = np.random.Generator


def palette(rng: Generator, count: int = 6) -> Image:
    """[count, 3] sRGB colours from dark to light whose hues lie near one hue or its opposite (in OKLCH)."""
    lightness = np.linspace(0.25, 0.92, count) + rng.uniform(-0.04, 0.04, count)
    opposite = rng.random(count) < 0.4
    hue = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.5, count) + opposite * np.pi
    chroma = rng.uniform(0.06, 0.17, count) * np.sin(np.clip(lightness, 0, 1) * np.pi) ** 0.5
    return _oklab_to_srgb(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1))


def _oklab_to_srgb(lab: NDArray[np.float64]) -> Image:
    """Björn Ottosson's OKLab, to sRGB clipped to 0 .. 1."""
    to_cone = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.707614701],
        ]
    )
    linear = np.clip((lab @ to_cone.T) ** 3 @ to_linear.T, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return srgb.astype(np.float32)


def shade_by(field: Image, colours: Image) -> Image:
    """The colours along a field in 0 .. 1, interpolated between neighbours."""
    place = np.clip(field, 0, 1) * (len(colours) - 1)
    low = np.minimum(place.astype(int), len(colours) - 2)
    share = (place - low)[..., None].astype(np.float32)
    return colours[low] * (1 - share) + colours[low + 1] * share


def fractal(rng: Generator, height: int, width: int, slope: float) -> Image:
    """[height, width] noise whose amplitude falls with frequency to the power `slope`; mean 0, deviation 1."""
    rows, columns = np.fft.fftfreq(2 * height)[:, None], np.fft.rfftfreq(2 * width)[None, :]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((2 * height, 2 * width))) * frequency**-slope
    field = np.fft.irfft2(spectrum, s=(2 * height, 2 * width))[:height, :width]
    return ((field - field.mean()) / (field.std() + 1e-9)).astype(np.float32)


def terrain(rng: Generator, height: int, width: int, colours: Image) -> Image:
    """Fractal hills, coloured by height and lit from one side."""
    hills = fractal(rng, height, width, rng.uniform(1.6, 2.2))
    slope_down, slope_right = np.gradient(hills * rng.uniform(3, 8))
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + 0.5 * np.tanh(np.cos(angle) * slope_right + np.sin(angle) * slope_down)
    return np.clip(shade_by(0.5 + hills / 4, colours) * light[..., None], 0, 1).astype(np.float32)


def stripes(rng: Generator, height: int, width: int, colours: Image) -> Image:
    """Bands of a few colours, straight or bent by smooth noise."""
    y, x = _grid(height, width)
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 28)
    bend = fractal(rng, height, width, 2.6) * rng.choice([0.0, 1.0, 3.0]) * period / 6
    phase = (np.cos(angle) * x + np.sin(angle) * y + bend) / period
    chosen = rng.permutation(len(colours))[: rng.integers(2, 5)]
    if rng.random() < 0.5:
        return colours[chosen][(np.floor(phase * len(chosen)).astype(int)) % len(chosen)]
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * phase)
    return shade_by(wave.astype(np.float32), colours[np.sort(chosen)])


def rings(rng: Generator, height: int, width: int, colours: Image) -> Image:
    """Waves around two or three centres, which interfere."""
    y, x = _grid(height, width)
    total = np.zeros((height, width))
    centres = int(rng.integers(1, 4))
    for _ in range(centres):
        centre_y, centre_x = rng.uniform(-0.2, 1.2, 2) * (height, width)
        total += np.sin(np.hypot(y - centre_y, x - centre_x) * 2 * np.pi / rng.uniform(9, 30))
    return shade_by((0.5 + total / (2 * centres)).astype(np.float32), colours)


def discs(rng: Generator, height: int, width: int, colours: Image) -> Image:
    """Shaded balls of many sizes on a gradient, the later over the earlier."""
    y, x = _grid(height, width)
    image = shade_by((y / height + 0 * x).astype(np.float32), colours[np.sort(rng.permutation(len(colours))[:2])])
    for _ in range(int(height * width / 1200) + 2):
        radius = 5 * (min(height, width) / 14) ** rng.random()
        paint_ball(rng, image, rng.uniform(0, height), rng.uniform(0, width), radius, colours)
    return image


def paint_ball(rng: Generator, image: Image, centre_y: float, centre_x: float, radius: float, colours: Image) -> None:
    """Paints a ball lit from the upper left over the image, in place."""
    top, left = max(0, int(centre_y - radius)), max(0, int(centre_x - radius))
    part = image[top : int(centre_y + radius) + 2, left : int(centre_x + radius) + 2]
    if part.size == 0:
        return
    y, x = _grid(*part.shape[:2])
    y, x = (y + top - centre_y) / radius, (x + left - centre_x) / radius
    inside = 1 - y**2 - x**2
    depth = np.sqrt(np.maximum(inside, 0))
    light = np.maximum(-0.5 * x - 0.6 * y + 0.62 * depth, 0)
    base = colours[rng.integers(len(colours))]
    colour = base * (0.25 + 0.75 * light)[..., None] + 0.7 * (light**12)[..., None]
    cover = np.clip(inside * radius / 2, 0, 1)[..., None]  # a smooth rim, about a pixel wide
    part[:] = np.clip(part * (1 - cover) + colour * cover, 0, 1)


class Mosaic:
    """A square motif, mirrored in itself, that tiles the plane; sides are multiples of 4 pixels."""

    def __init__(self, rng: Generator, colours: Image) -> None:
        half = int(rng.choice([8, 10, 12, 14, 16, 20]))
        field = fractal(rng, half, half, rng.uniform(1.2, 2.0))
        if rng.random() < 0.6:
            field = (field + field.T) / 2
        levels = int(rng.integers(3, 6))
        ranks = field.ravel().argsort().argsort().reshape(half, half) * levels // (half * half)
        quarter = colours[rng.permutation(len(colours))[:levels]][ranks]
        upper = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
        self.tile = np.concatenate([upper, upper[::-1]], axis=0)

    def __call__(self, rng: Generator, height: int, width: int, colours: Image) -> Image:
        """The panel tiled from a corner that is a multiple of 4 pixels."""
        side = len(self.tile)
        down, right = rng.integers(0, side // 4, 2) * 4
        rows, columns = (np.arange(height) + down) % side, (np.arange(width) + right) % side
        return self.tile[rows[:, None], columns[None, :]]


class Alphabet:
    """Glyphs of 12 x 16 pixels made of strokes, written in words and lines."""

    HEIGHT, WIDTH = 16, 12

    def __init__(self, rng: Generator, colours: Image) -> None:
        self.glyphs = np.stack([self._glyph(rng) for _ in range(int(rng.integers(6, 16)))])
        dark, light = colours[rng.integers(0, 2)], colours[rng.integers(len(colours) - 2, len(colours))]
        self.paper, self.ink = (light, dark) if rng.random() < 0.7 else (dark, light)

    @classmethod
    def _glyph(cls, rng: Generator) -> Image:
        """[HEIGHT, WIDTH] coverage: strokes between points of a 3 x 4 lattice."""
        y, x = _grid(cls.HEIGHT, cls.WIDTH)
        glyph = np.zeros((cls.HEIGHT, cls.WIDTH))
        lattice = np.array([(row, column) for row in (2.5, 5.5, 8.5, 12.5) for column in (2.0, 5.0, 8.0)])
        for start, end in rng.choice(12, (int(rng.integers(3, 6)), 2)):
            (y0, x0), (y1, x1) = lattice[start], lattice[end]
            length = (y1 - y0) ** 2 + (x1 - x0) ** 2 + 1e-6
            along = np.clip(((y - y0) * (y1 - y0) + (x - x0) * (x1 - x0)) / length, 0, 1)
            distance = np.hypot(y - y0 - along * (y1 - y0), x - x0 - along * (x1 - x0))
            glyph = np.maximum(glyph, np.clip(1.6 - distance, 0, 1))
        return glyph.astype(np.float32)

    def __call__(self, rng: Generator, height: int, width: int, colours: Image) -> Image:
        """A page: each place holds a glyph, or with a chance of 1 in 6 a gap."""
        rows, columns = height // self.HEIGHT + 1, width // self.WIDTH + 1
        text = self.glyphs[rng.integers(len(self.glyphs), size=(rows, columns))]
        text = text * (rng.random((rows, columns, 1, 1)) > 1 / 6)
        page = text.transpose(0, 2, 1, 3).reshape(rows * self.HEIGHT, columns * self.WIDTH)[:height, :width, None]
        return (self.paper * (1 - page) + self.ink * page).astype(np.float32)


def _grid(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Row and column numbers, [height, 1] and [1, width]."""
    return np.arange(height, dtype=np.float64)[:, None], np.arange(width, dtype=np.float64)[None, :]
