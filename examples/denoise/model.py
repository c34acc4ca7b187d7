"""A small vision transformer that removes noise: 4 x 4 pixel patches, 2-D RoPE, global attention in every layer.

What can be cleaned from the neighbourhood is left to convolutions (at pixels, and 3 x 3 over tokens in each block);
attention, over all tokens of the picture, averages what is repeated elsewhere. It is trained on a few hundred to a
few thousand tokens and used on 16384, for which two things help:

- queries and keys are normalised, and the logits grow with the logarithm of the number of tokens;
- RoPE turns half of each head's channels, so the other half can compare content at any distance.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS_PATH = Path(__file__).parent / "weights.safetensors"
TOKEN_BLOCK = 8  # tokens a side


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of the model; `dim` must be a multiple of `heads`, and `dim // heads` of 8."""

    patch: int = 4
    features: int = 24  # channels at pixels
    dim: int = 128
    layers: int = 4
    heads: int = 2
    mlp_dim: int = 384

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class Rotary(nn.Module):
    """2-D RoPE: of each head's channels one quarter turns with the row, one with the column, half stay as they are."""

    def __init__(self, head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        count = head_dim // 8  # angles per axis
        self.register_buffer("frequencies", base ** (-torch.arange(count) / count), persistent=False)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines, sines), each [batch, 1, tokens, head_dim // 4], for positions [batch, tokens, 2] (row, column)."""
        angles = (positions[..., None].float() * self.frequencies).flatten(2)[:, None]
        return angles.cos(), angles.sin()

    @staticmethod
    def turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] to the same shape."""
        count = cosines.shape[-1]
        first, second, rest = x.split([count, count, x.shape[-1] - 2 * count], dim=-1)
        return torch.cat([first * cosines - second * sines, first * sines + second * cosines, rest], dim=-1)


class Layout:
    """Where tokens stand: their order in the sequence, and the angles of their positions.

    Tokens follow one another block by block, not row by row: 64 or 128 neighbours in the sequence are then a compact
    patch of the picture. What attention computes does not depend on the order, but how many of its tiles matter does.
    """

    def __init__(self, corners: Tensor, rows: int, columns: int, rotary: Rotary, block: int = TOKEN_BLOCK) -> None:
        """corners: [pictures, windows, 2]. block: tokens a side; 1 for row by row."""
        self.windows, self.rows, self.columns = corners.shape[1], rows, columns
        row = torch.arange(rows, device=corners.device)[:, None].expand(rows, columns).flatten()
        column = torch.arange(columns, device=corners.device).repeat(rows)
        place = ((row // block * columns + column // block) * block + row % block) * block + column % block
        self.order = place.argsort()
        self.back = self.order.argsort()
        positions = corners[:, :, None] + torch.stack([row, column], dim=-1)[self.order]
        self.cosines, self.sines = rotary.angles(positions.flatten(1, 2))

    def to_tokens(self, x: Tensor) -> Tensor:
        """[pictures * windows, dim, rows, columns] to [pictures, windows * rows * columns, dim]."""
        return x.flatten(2).transpose(1, 2)[:, self.order].unflatten(0, (-1, self.windows)).flatten(1, 2)

    def to_grid(self, tokens: Tensor) -> Tensor:
        """The inverse of `to_tokens`."""
        of_windows = tokens.unflatten(1, (self.windows, -1)).flatten(0, 1)[:, self.back]
        return of_windows.transpose(1, 2).unflatten(2, (self.rows, self.columns))


class Attention(nn.Module):
    """Self-attention over all tokens, with normalised queries and keys and logits that scale with log(tokens)."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.sharpness = nn.Parameter(torch.full((config.heads, 1, 1), 2.0))
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """[batch, tokens, dim] to the same shape; the angles are `Rotary.angles`."""
        q, k, v = (part.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        # The logit of a query and a key is sharpness * log(tokens) * cos(q, k).
        gain = self.sharpness * math.log(x.shape[1]) / math.sqrt(self.head_dim)
        q = Rotary.turn(F.rms_norm(q, (self.head_dim,)) * gain.to(q.dtype), cosines, sines)
        k = Rotary.turn(F.rms_norm(k, (self.head_dim,)), cosines, sines)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A depthwise 3 x 3 convolution over tokens, attention, and an MLP, each with a residual."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.neighbours = nn.Conv2d(config.dim, config.dim, 3, padding=1, groups=config.dim)
        self.attention_norm = nn.RMSNorm(config.dim, elementwise_affine=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, config.dim)
        )

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[pictures * windows, dim, rows, columns] to the same shape; the windows of one picture see each other."""
        x = x + self.neighbours(x)
        tokens = layout.to_tokens(x)
        tokens = tokens + self.attention(self.attention_norm(tokens), layout.cosines, layout.sines)
        tokens = tokens + self.mlp(self.mlp_norm(tokens))
        return layout.to_grid(tokens)


class Denoiser(nn.Module):
    """Noisy pixels in, clean pixels out."""

    def __init__(self, config: DenoiserConfig | None = None) -> None:
        super().__init__()
        self.config = config or DenoiserConfig()
        features, dim, patch = self.config.features, self.config.dim, self.config.patch
        self.stem = nn.Sequential(
            nn.Conv2d(3, features, 3, padding=1), nn.GELU(), nn.Conv2d(features, features, 3, padding=1)
        )
        self.embed = nn.Conv2d(features, dim, patch, stride=patch)
        self.rotary = Rotary(self.config.head_dim)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(self.config.layers))
        self.unpack = nn.Sequential(nn.Conv2d(dim, features * patch**2, 1), nn.PixelShuffle(patch))
        self.head = nn.Sequential(
            nn.GELU(), nn.Conv2d(features, features, 3, padding=1), nn.GELU(), nn.Conv2d(features, 3, 3, padding=1)
        )

    def forward(self, noisy: Tensor, corners: Tensor | None = None) -> Tensor:
        """Clean images for noisy ones, both float [images, 3, height, width] in 0 .. 1; sides are multiples of 4.

        corners: [pictures, windows, 2] int64, for training on parts of large pictures: the images are then
            pictures x windows, and corners tell which token (row, column) of its picture each window begins with.
            None: each image is a picture of its own.
        """
        height, width = noisy.shape[2] // self.config.patch, noisy.shape[3] // self.config.patch
        if corners is None:
            corners = noisy.new_zeros(len(noisy), 1, 2, dtype=torch.long)
        layout = Layout(corners, height, width, self.rotary)
        pixels = self.stem(noisy - 0.5)
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x, layout)
        return self.head(self.unpack(x) + pixels) + 0.5


def save_weights(model: Denoiser, path: Path = WEIGHTS_PATH) -> None:
    """Write the parameters as float16, with the config as metadata."""
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={name: str(size) for name, size in asdict(model.config).items()})


def load_pretrained(path: Path = WEIGHTS_PATH) -> Denoiser:
    """The trained model in evaluation mode: float32, on the CPU, of the default config."""
    model = Denoiser()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)
