"""Models of equal blocks, profiles for them, and the two ways to compile them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from light import Attention, LightBackend
from torch import Tensor, nn

import sparge_compile as sparge
from sparge_compile import Policy, Profile
from sparge_kernels.thresholds import Thresholds

X = torch.randn(1, 700, 16).cumsum(1) / 26

POLICY = Policy(min_tokens=0, precision="none", similarity_threshold=-1.0, cdf_threshold=1.0)


class Block(nn.Module):
    """The attention is in a child, called by a helper, as in most libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self._attend(x)

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn1(x)


class Net(nn.Module):
    def __init__(self, depth: int = 6, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class TwoCalls(nn.Module):
    """Two attention calls of one module: `name:1` and `name:2`."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        once = F.scaled_dot_product_attention(q, q, q)
        twice = F.scaled_dot_product_attention(once + q, q, q)
        return twice.transpose(1, 2).flatten(2)


def keep(topk: float) -> tuple[Thresholds, ...]:
    return (Thresholds(topk, 1.0, -1.0, None),)


def per_head(number: int) -> tuple[Thresholds, ...]:
    return (*keep(0.1 + 0.15 * number), *keep(1.0 - 0.1 * number))


def net(depth: int = 6, block: type[nn.Module] = Block) -> nn.Module:
    return Net(depth, block).eval().requires_grad_(False)


def net_like(model: nn.Module) -> nn.Module:
    """An unattached, uncompiled model with the same weights."""
    other = net(len(model.blocks))
    other.load_state_dict(model.state_dict())
    return other


def profile(depth: int = 6, site: str = "blocks.{}.attn1") -> Profile:
    return Profile({site.format(n): per_head(n) for n in range(depth)})


def whole(model: nn.Module, own: Profile, policy: Policy = POLICY) -> Tensor:
    """What the model gives with the thresholds as constants of one graph."""
    backend = LightBackend(sparge.policy.replace(policy, {"profile": own}))
    out = torch.compile(model, backend=backend)(X)
    assert all(backend.rewritten)
    return out


def by_block(model: nn.Module, policy: Policy = POLICY) -> LightBackend:
    backend = LightBackend(policy)
    for block in model.blocks:
        block.compile(backend=backend)
    return backend
