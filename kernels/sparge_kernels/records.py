"""What calls of the operator did, for those who ask: densities, chosen tiles, and how long dense would have taken."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_kernels.mask_inputs import attending
from sparge_kernels.thresholds import K_TILE, Q_TILE
from sparge_kernels.tiles import tile_count

SHORT_MS = 20.0  # that calls take together


@dataclass(frozen=True)
class StatsRecord:
    """What one call did.

    Attributes:
        site: as the call names it.
        lengths: of the queries and the keys, in tokens.
        density, pv_skipped: fp32 [B, Hq] on the call's device.
        ran: which way.
        tiles: the tiles it computed, bool [B, Hq, ceil(Sq / 128), ceil(Sk / 64)] on the CPU; None if nobody asked, or
            if it ran dense.
        dense_ms, sparse_ms: milliseconds of F.scaled_dot_product_attention and of this operator on the call's tensors;
            None if nobody asked, memory ran out, the call was empty or, of sparse_ms, if it ran dense.
    """

    site: str
    lengths: tuple[int, int]
    density: Tensor
    pv_skipped: Tensor
    ran: Literal["sparse", "dense"]
    tiles: Tensor | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None


class CallTimer:
    """Times calls, after one run to warm up for each kind of call that it has not met.

    One run of each; of short ones on a CPU, which a busy machine disturbs most, the best of three in turn.
    """

    def __init__(self) -> None:
        self._warm: set[Hashable] = set()

    def __call__(self, calls: Sequence[Callable[[], object]], tensors: Sequence[Tensor]) -> list[float] | None:
        """Milliseconds of each call on these tensors, whose sizes, types and device are its kind. None: no memory.

        On a GPU by events on the current stream, without a wait between the calls.
        """
        device = tensors[0].device
        kind = (len(calls), *((x.shape, x.stride(), x.dtype, x.device) for x in tensors))
        try:
            for call in () if kind in self._warm else calls:
                call()
            self._warm.add(kind)
            return _on_gpu(calls, device) if device.type == "cuda" else _on_cpu(calls)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None


def is_out_of_memory(error: Exception) -> bool:
    """Did a device run out of memory? On a CPU torch says so in words only."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _on_cpu(calls: Sequence[Callable[[], object]]) -> list[float]:
    rounds = [[_wall_clock(call) for call in calls]]
    while sum(rounds[0]) < SHORT_MS and len(rounds) < 3:
        rounds.append([_wall_clock(call) for call in calls])
    return [min(of_call) for of_call in zip(*rounds, strict=True)]


def _wall_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _on_gpu(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        events[-1].synchronize()
        return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def _calls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **kwargs: Any,
) -> tuple[list[Tensor], Callable[[], object], Callable[[], object]]:
    """(the tensors of a call, the call as F.scaled_dot_product_attention does it, as this operator does)."""
    mask = None if attn_mask is None else attending(attn_mask, kwargs.get("mask_hides", False))
    options = {name: kwargs[name] for name in ("is_causal", "scale", "enable_gqa") if name in kwargs}
    dense = partial(F.scaled_dot_product_attention, query, key, value, mask, **options)
    sparse = partial(torch.ops.sparge.attention.default, query, key, value, attn_mask, *rest, **kwargs)
    return [query, key, value, *([] if mask is None else [mask])], dense, sparse


class Recorder:
    """What is kept of the calls of one `record_stats`."""

    def __init__(self, keeps_tiles: Callable[[str], bool] | None, timer: CallTimer | None) -> None:
        self.records: list[StatsRecord] = []
        self._timer = timer
        self._keeps_tiles = keeps_tiles

    def add(self, record: StatsRecord, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Keeps the record of the call with these arguments of the operator, with its times if they are asked for."""
        if record.tiles is not None:
            record = replace(record, tiles=record.tiles.cpu())
        if self._timer is not None:
            tensors, dense, sparse = _calls(*args, **kwargs)
            calls = (dense, sparse) if record.ran == "sparse" else (dense,)
            # An empty call takes no time, and torch 2.11's CPU kernel dies of a division by zero heads.
            if all(x.numel() for x in tensors):
                with _unrecorded(), torch.autocast(tensors[0].device.type, enabled=False):
                    dense_ms, sparse_ms = (*(self._timer(calls, tensors) or ()), None, None)[:2]
                record = replace(record, dense_ms=dense_ms, sparse_ms=sparse_ms)
        self.records.append(record)

    def room_for_tiles(self, site: str, query: Tensor, key: Tensor) -> Tensor | None:
        """Where a kernel writes the tiles it computes, if they are asked for: bool [B, Hq, nQ, nK], all False."""
        if self._keeps_tiles is None or not self._keeps_tiles(site):
            return None
        shape = (*query.shape[:2], tile_count(query.shape[2], Q_TILE), tile_count(key.shape[2], K_TILE))
        return torch.zeros(shape, dtype=torch.bool, device=query.device)


_recorder: ContextVar[Recorder | None] = ContextVar("sparge_stats_recorder", default=None)


def recording() -> Recorder | None:
    """The innermost `record_stats` around this call."""
    return _recorder.get()


@contextmanager
def record_stats(
    keeps_tiles: Callable[[str], bool] | None = None, timer: CallTimer | None = None
) -> Iterator[list[StatsRecord]]:
    """Yields a list to which every sparge call inside, in this thread or task, appends a StatsRecord.

    Args:
        keeps_tiles: of which sites, by name, the tiles are kept: Sq * Sk / 8192 bytes for each batch and head.
        timer: also time each call, dense and sparse.
    """
    recorder = Recorder(keeps_tiles, timer)
    token = _recorder.set(recorder)
    try:
        yield recorder.records
    finally:
        _recorder.reset(token)


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Calls inside append nothing."""
    token = _recorder.set(None)
    try:
        yield
    finally:
        _recorder.reset(token)
