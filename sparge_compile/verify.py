"""The chosen thresholds on the kernel: every row of every input, and a step back wherever a head is over budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparge_compile.profile_data import Measurement
from sparge_compile.search import Call, compare
from sparge_kernels.thresholds import Thresholds, pack


class Unfit(Exception):
    """A site cannot run sparsely within the budget; the text says why."""


@dataclass
class Verified:
    """A site's heads on the kernel. Every list has an entry per query head.

    Attributes:
        ladders: candidates by number, from the sparsest to ever more careful ones; the last keeps everything.
        step: where on its ladder each head stands.
        error, total: sum|o - o_dense| and sum|o_dense| over the inputs so far. A head that stepped back keeps what it
            lost on earlier inputs, so error may be overstated.
        worst_row: least cosine of a row so far, under those earlier thresholds too.
        computed, visible: tiles, under the thresholds the head has now.
    """

    ladders: list[list[int]]
    step: list[int] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    worst_row: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    visible: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        heads = len(self.ladders)
        for name, value in (("step", 0), ("error", 0.0), ("total", 0.0), ("computed", 0.0), ("visible", 0.0)):
            setattr(self, name, list(getattr(self, name)) or [value] * heads)
        self.worst_row = list(self.worst_row) or [1.0] * heads

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def chosen(self, head: int) -> int:
        """The number of the head's candidate."""
        return self.ladders[head][self.step[head]]

    def measurement(self, head: int) -> Measurement:
        """What was measured of a head."""
        total = self.total[head]
        density = self.computed[head] / self.visible[head] if self.visible[head] else 1.0
        return Measurement(self.error[head] / total if total else 0.0, self.worst_row[head], density)

    def verify(
        self, call: Call, tried: Sequence[Thresholds], predictor: str, max_error: float, min_row_cosine: float
    ) -> None:
        """Adds one call; heads over budget step back, twice as far each time, and run again.

        Raises:
            Unfit: a head is over budget with every tile kept.
        """
        heads, stride = list(range(len(self.ladders))), 1
        while heads:
            results = self._run(call, heads, [tried[self.chosen(head)] for head in heads], predictor)
            failed = []
            for head, found in zip(heads, results, strict=True):
                if self._fits(head, found, max_error, min_row_cosine):
                    self._add(head, found, float(call.query.shape[2]) * call.key.shape[2])
                elif self.step[head] == len(self.ladders[head]) - 1:
                    raise Unfit(self._reason(head, found, max_error, min_row_cosine))
                else:
                    failed.append(head)
                    self.step[head] = min(self.step[head] + stride, len(self.ladders[head]) - 1)
                    self.computed[head] = self.visible[head] = 0.0
            heads, stride = failed, 2 * stride

    @staticmethod
    def _run(call: Call, heads: list[int], thresholds: list[Thresholds], predictor: str) -> list[Found]:
        query, key, value, dense, mask = call.query, call.key, call.value, call.dense, call.attn_mask
        group = query.shape[1] // key.shape[1]
        if len(heads) < query.shape[1]:
            chosen = torch.tensor(heads, device=query.device)
            query, dense = query[:, chosen], dense[:, chosen]
            key, value = key[:, chosen // group], value[:, chosen // group]
            mask = mask if mask is None or mask.shape[1] == 1 else mask[:, chosen]
        output, density, _ = torch.ops.sparge.attention_with_stats(
            query,
            key,
            value,
            mask,
            thresholds=pack(thresholds),
            is_causal=call.is_causal,
            scale=call.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            precision=call.precision,
            predictor=predictor,
        )
        return [
            _compared(output[:, i], dense[:, i], float(density[:, i].sum()), len(density)) for i in range(len(heads))
        ]

    def _fits(self, head: int, found: Found, max_error: float, min_row_cosine: float) -> bool:
        error, total = self.error[head] + found.error, self.total[head] + found.total
        return error <= max_error * total and found.worst_row >= min_row_cosine  # NaN does not

    def _add(self, head: int, found: Found, pairs: float) -> None:
        self.error[head] += found.error
        self.total[head] += found.total
        self.worst_row[head] = min(self.worst_row[head], found.worst_row)
        self.computed[head] += found.density * pairs
        self.visible[head] += found.batch * pairs

    def _reason(self, head: int, found: Found, max_error: float, min_row_cosine: float) -> str:
        relative = found.error / found.total if found.total else found.error
        return (
            f"head {head} with every tile kept has a relative L1 of {relative:.3g} (max_error is {max_error:g}) and a "
            f"row of cosine {found.worst_row:.3g} (min_row_cosine is {min_row_cosine:g})"
        )


@dataclass(frozen=True)
class Found:
    """One head in one call: sums of `compare`, and the density summed over `batch` entries."""

    error: float
    total: float
    worst_row: float
    density: float
    batch: int


def _compared(output: Tensor, dense: Tensor, density: float, batch: int) -> Found:
    """output, dense [B, Sq, Dv] of one head."""
    error, total, worst = compare(output, dense)
    return Found(float(error.double().sum()), float(total.double().sum()), float(worst.min()), density, batch)
