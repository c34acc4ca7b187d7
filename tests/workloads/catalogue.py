"""Every workload of the default policy, by name: `WORKLOADS[name](tokens)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile.bench.field import smooth_field
from workloads.language import language_field
from workloads.recall import recall_layer
from workloads.video import video_field


@dataclass(frozen=True)
class Needle:
    """Query `query` of head `head` must find key `key`: its value stands out, dense attention returns it."""

    head: int
    query: int
    key: int


@dataclass(frozen=True)
class Workload:
    """q [1, H, Sq, D], k, v [1, H, Sk, D], fp32. needles: what dense attention finds and sparse must."""

    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool = False
    needles: tuple[Needle, ...] = ()


def video_grid(tokens: int) -> tuple[int, int, int]:
    """Frames of 16 x 32 tokens (32 x 32 from 8192 on)."""
    frame = (16, 32) if tokens < 8192 else (32, 32)
    if tokens % (frame[0] * frame[1]):
        raise ValueError(f"tokens={tokens}: must be a multiple of {frame[0] * frame[1]}.")
    return tokens // (frame[0] * frame[1]), *frame


def smooth(gain: float, noise: float, head_dim: int = 64) -> Callable[[int], Workload]:
    """The smooth field of field.py, rows of 128 tokens."""

    def make(tokens: int) -> Workload:
        rows = tokens // 128
        height = next(h for h in (8, 4, 2, 1) if rows % h == 0)
        field = smooth_field((rows // height, height, 128), head_dim=head_dim, gain=gain, noise=noise)
        return Workload(*field)

    return make


def video(**options: object) -> Callable[[int], Workload]:
    """A field of video.py."""

    def make(tokens: int) -> Workload:
        return Workload(*video_field(video_grid(tokens), **options))  # type: ignore[arg-type]

    return make


def language(**options: object) -> Callable[[int], Workload]:
    """A causal field of language.py."""

    def make(tokens: int) -> Workload:
        return Workload(*language_field(tokens, **options), is_causal=True)  # type: ignore[arg-type]

    return make


def cross(words: int) -> Callable[[int], Workload]:
    """Video queries over `words` text tokens: unlike each other, the first a sink, as padding makes it."""

    def make(tokens: int) -> Workload:
        q, _, _ = video_field(video_grid(tokens), gain=2.0)
        generator = torch.Generator().manual_seed(1)
        heads, dim = q.shape[1], q.shape[3]
        k, v = (F.normalize(torch.randn(heads, words, dim, generator=generator), dim=-1) for _ in range(2))
        k = k * 2.0 * dim**0.25
        k[:, 0] = 1.5 * dim**0.25 * F.normalize(q[0].mean(1), dim=-1)
        return Workload(q, k[None], v[None] * dim**0.5)

    return make


def needles(base: Callable[[int], Workload], count: int = 12, strength: float = 14.0) -> Callable[[int], Workload]:
    """`base` with single keys planted that single queries, alone in their tile, must find (never-wrong.md 17).

    The needle scores `strength` nats above 0, and above all else by enough to win; one stands in the tail tile.
    """

    def make(tokens: int) -> Workload:
        made = base(tokens)
        q, k, v = made.q.clone(), made.k.clone(), made.v.clone()
        heads, q_len, dim = q.shape[1:]
        generator = torch.Generator().manual_seed(2)
        planted = []
        for number in range(count):
            head = number % heads
            key = int(torch.randint(64, k.shape[2], (), generator=generator)) if number else k.shape[2] - 3
            lowest = key + 1 if made.is_causal else 0
            query = int(torch.randint(lowest, q_len, (), generator=generator)) if lowest < q_len - 1 else q_len - 1
            direction = F.normalize(torch.randn(dim, generator=generator), dim=-1)
            size = (strength * dim**0.5) ** 0.5
            q[0, head, query], k[0, head, key] = size * direction, size * direction
            v[0, head, key] = 5.0 * direction.sign()
            planted.append(Needle(head, query, key))
        return Workload(q, k, v, made.is_causal, tuple(planted))

    return make


def loud(channels: int, is_causal: bool) -> Callable[[int], Workload]:
    """Keys that vary, inside each tile, in a few loud channels, and queries that look along these."""

    def make(tokens: int) -> Workload:
        generator = torch.Generator().manual_seed(4)

        def randn(*shape: int) -> Tensor:
            return torch.randn(1, 2, *shape, generator=generator)

        size = {4: 4.0, 8: 3.0}[channels]
        k = (1.5 * randn(-(-tokens // 64), 64)).repeat_interleave(64, 2)[:, :, :tokens] + 0.1 * randn(tokens, 64)
        k[..., :channels] += size * randn(tokens, channels)
        q = 0.5 * randn(tokens, 64)
        looks = randn(-(-tokens // 128), channels).repeat_interleave(128, 2)[:, :, :tokens]
        q[..., :channels] += looks * 36 / channels**0.5 / size
        return Workload(q, k, randn(tokens, 64), is_causal)

    return make


def uniform(is_causal: bool) -> Callable[[int], Workload]:
    """Nothing to predict."""

    def make(tokens: int) -> Workload:
        generator = torch.Generator().manual_seed(3)
        q, k, v = (torch.randn(1, 2, tokens, 64, generator=generator) for _ in range(3))
        return Workload(q, k, v, is_causal)

    return make


def recall(layer: int, spread: int) -> Callable[[int], Workload]:
    """Q, K and V of a layer of the trained recall model, at its questions' tail too."""

    def make(tokens: int) -> Workload:
        return Workload(*recall_layer(layer, tokens, spread), is_causal=True)

    return make


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "smooth, gain 2": smooth(2.0, 0.2),
    "smooth, gain 3": smooth(3.0, 0.2),
    "smooth, gain 4, noisy": smooth(4.0, 0.5),
    "smooth, gain 3, dim 128": smooth(3.0, 0.2, head_dim=128),
    "video, gain 2": video(gain=2.0),
    "video, gain 4": video(gain=4.0),
    "video, gain 3, sink": video(gain=3.0, sink=True),
    "video, gain 3, key bias": video(gain=3.0, key_bias=2.0),
    "video, gain 3, text": video(gain=3.0, text=226),
    "language": language(),
    "language, sharp": language(topic_gain=3.0, sink_gain=12.0, noise=0.3),
    "recall, layer 0": recall(0, 1),
    "recall, layer 1": recall(1, 1),
    "recall, layer 1, scattered": recall(1, 16),
    "cross, 77 words": cross(77),
    "cross, 512 words": cross(512),
    "needles in smooth": needles(smooth(3.0, 0.2)),
    "needles in video": needles(video(gain=3.0)),
    "needles in language": needles(language()),
    "loud channels, 4": loud(4, is_causal=False),
    "loud channels, 8": loud(8, is_causal=False),
    "loud channels, 8, causal": loud(8, is_causal=True),
    "uniform": uniform(False),
    "uniform, causal": uniform(True),
}
