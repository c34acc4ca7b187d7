"""A two-layer causal transformer without position encoding that recalls values by their keys.

Three things let it work at lengths far beyond those it is trained at:

- there are no positions: attention finds a key by content;
- a short causal convolution over the attention keys lets a value's token carry the key before it;
- queries and keys are normalised, and the logits grow with the logarithm of the number of visible
  tokens (scalable softmax), so that one planted token still outweighs all distractors together.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS_PATH = Path(__file__).parent / "weights.safetensors"


@dataclass(frozen=True)
class RecallConfig:
    """Sizes of the model; `dim` must be a multiple of `heads`."""

    vocabulary: int = 1088
    dim: int = 128
    layers: int = 2
    heads: int = 2
    mlp_dim: int = 256
    convolution: int = 3  # tokens that the convolution over the attention keys sees

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class KeyConvolution(nn.Module):
    """Causal depthwise convolution over tokens: channel c at token t mixes tokens t - width + 1 .. t."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.randn(dim, 1, width) / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, dim] to the same shape."""
        padded = F.pad(x.transpose(1, 2), (self.width - 1, 0))
        return F.conv1d(padded, self.weight, groups=self.weight.shape[0]).transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys and logits that scale with log(length)."""

    def __init__(self, config: RecallConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.key_convolution = KeyConvolution(config.dim, config.convolution)
        self.sharpness = nn.Parameter(torch.full((config.heads, 1, 1), 1.5))
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, dim] to the same shape."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = self._split(q), self._split(self.key_convolution(k)), self._split(v)
        # The logit of a row that sees n tokens is sharpness * log(n + 1) * cos(q, k).
        visible = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32)
        gain = self.sharpness * torch.log1p(visible)[:, None] / math.sqrt(self.head_dim)
        q = F.rms_norm(q, (self.head_dim,)) * gain.to(q.dtype)
        k = F.rms_norm(k, (self.head_dim,))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[batch, length, dim] to [batch, heads, length, head_dim]."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: RecallConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, dim] to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class RecallModel(nn.Module):
    """Tokens in, logits over the vocabulary out; the output layer is the embedding, transposed."""

    def __init__(self, config: RecallConfig | None = None) -> None:
        super().__init__()
        self.config = config or RecallConfig()
        self.embedding = nn.Embedding(self.config.vocabulary, self.config.dim)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.embedding_norm = nn.RMSNorm(self.config.dim)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(self.config.layers))
        self.output_norm = nn.RMSNorm(self.config.dim)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [batch, count, vocabulary] for tokens [batch, length] int64.

        positions: [batch, count] int64, the positions to give logits for; all of them when None.
        """
        x = self.embedding_norm(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        if positions is not None:
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
        return F.linear(self.output_norm(x), self.embedding.weight)


def save_weights(model: RecallModel, path: Path = WEIGHTS_PATH) -> None:
    """Write the parameters as float16, with the config as metadata."""
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={name: str(size) for name, size in asdict(model.config).items()})


def load_pretrained(path: Path = WEIGHTS_PATH) -> RecallModel:
    """The trained model in evaluation mode: float32, on the CPU, of the default config."""
    model = RecallModel()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)
