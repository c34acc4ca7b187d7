"""The GPU implementation of `sparge::attention`, in Triton: stage 1 and quantization, then the sparse loop.

It follows reference.py with centring="call". Nothing here waits for the GPU, copies from the host or allocates by the
data: calls run on the current stream and in CUDA graphs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sparge_kernels.thresholds import DEFAULT_PREDICTOR, K_TILE, NEVER_SKIP, PV_DROP_BUDGET, Q_TILE, Thresholds
from sparge_kernels.tiles import tile_count
from sparge_kernels.triton import attend as loop
from sparge_kernels.triton import launch
from sparge_kernels.triton.keys import KeyTiles, prepare_keys
from sparge_kernels.triton.mask import MaskTiles, classify_mask
from sparge_kernels.triton.nonfinite import spread_non_finite_kernel
from sparge_kernels.triton.numbers import thresholds_on
from sparge_kernels.triton.queries import QueryTiles, prepare_queries
from sparge_kernels.triton.rows import broadcast_strides, row_strides, unit_last_stride
from sparge_kernels.triton.select import MAX_K_TILES, Selection, select_tiles
from sparge_kernels.triton.weights import weigh_tiles

MAX_KEYS = MAX_K_TILES * K_TILE


@dataclass(frozen=True)
class Prepared:
    """A call after stage 1 and quantization: what the sparse loop needs."""

    q: Tensor  # [B, Hq, Sq, D], last stride 1, and so K and V
    k: Tensor  # [B, Hkv, Sk, D]
    v: Tensor  # [B, Hkv, Sk, Dv]
    attn_mask: Tensor | None
    queries: QueryTiles
    keys: KeyTiles
    mask_tiles: MaskTiles | None
    selection: Selection
    thresholds: Tensor  # fp64 [Hq, 4]
    skips: bool  # some head has stage 2, or may have
    is_causal: bool
    scale: float
    quantized: bool


def unavailable(device: torch.device, k_len: int = 0) -> str | None:
    """None if the kernels can run a call with `k_len` keys on such a device here, else the reason."""
    if k_len > MAX_KEYS:
        return f"{k_len} keys are more than the {MAX_KEYS} whose tiles the selection kernel holds in registers"
    if device.type == "cpu":
        return _interpreter_unavailable()
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU is sm{major}{minor}; the kernels need the matrix instructions of sm80 and later"
    if major in (10, 11) and triton_version() < (3, 9):  # 3.6 cannot compile stage 2 there
        return f"the GPU is sm{major}{minor}, for which Triton {triton.__version__} is too old; 3.9 and later compile"
    return None


def _interpreter_unavailable() -> str | None:
    if not triton.knobs.runtime.interpret:
        return "Triton's interpreter is off; set TRITON_INTERPRET=1 before Triton is imported"
    if triton_version() < (3, 7):
        import numpy

        if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):  # takes no array of one number for a number
            return f"Triton {triton.__version__} cannot interpret with NumPy {numpy.__version__}; install numpy<2.4"
    return None


def triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    thresholds: Sequence[Thresholds] | Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    precision: str,
    predictor: str = DEFAULT_PREDICTOR,
    out: Tensor,
    lse: Tensor | None = None,
    with_statistics: bool = True,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Writes the attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Sk, D / Dv] to out [B, Hq, Sq, Dv].

    thresholds: one entry per query head, or a table on q's device: fp64 [1 or Hq, 4], as thresholds.pack gives them.
    Any strides; no empty tensors; at most `MAX_KEYS` keys. Query head h reads kv head h // (Hq // Hkv).
    lse: fp32 [B, Hq, Sq], contiguous, receives ln of the sum of exp(score) over computed keys.
    kept: bool [B, Hq, nQ, nK], receives the tiles that were chosen.
    Returns density and pv_skipped, fp32 [B, Hq], if `with_statistics`: a dozen small kernels more.
    """
    with _current(q.device):
        prepared = prepare(
            q,
            k,
            v,
            thresholds=thresholds,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            precision=precision,
            predictor=predictor,
        )
        skipped = attend(prepared, out, lse)
        if kept is not None:
            kept.copy_(prepared.selection.kept())
        return statistics(prepared.selection, skipped, q.shape[2]) if with_statistics else None


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    thresholds: Sequence[Thresholds] | Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    precision: str,
    predictor: str = DEFAULT_PREDICTOR,
) -> Prepared:
    """Stage 1 and quantization of a call; arguments as in `attention`."""
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    q_len, k_len, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    quantized, clustered = precision == "int8", predictor == "clusters"
    numbers = thresholds_on(q.device, thresholds, q.shape[1])
    keys = prepare_keys(k, v, is_causal=is_causal, quantized=quantized, clustered=clustered)
    queries = prepare_queries(q, keys.centre, group, sign=-1 if scale < 0 else 1)
    mask_tiles = None if attn_mask is None else classify_mask(attn_mask, q_len, k_len)
    weights = None
    if keys.clusters is not None:
        weights = weigh_tiles(q, keys.clusters, mask_tiles, is_causal=is_causal, scale=scale, k_len=k_len)
    selection = select_tiles(
        queries,
        keys,
        mask_tiles,
        numbers,
        is_causal=is_causal,
        scale=scale,
        q_len=q_len,
        k_len=k_len,
        weights=weights,
    )
    # A table's numbers are on the device: reading them would wait for it.
    skips = isinstance(thresholds, Tensor) or any(entry.skip_below(k_len) > NEVER_SKIP for entry in thresholds)
    return Prepared(
        q, k, v, attn_mask, queries, keys, mask_tiles, selection, numbers, skips, is_causal, scale, quantized
    )


def attend(call: Prepared, out: Tensor, lse: Tensor | None = None) -> Tensor | None:
    """The sparse loop, into `out`. Returns the tiles whose P V stage 2 skipped, int32 [B, Hq, nQ, parts of a tile];
    None if no head has stage 2.
    """
    q, k, v = call.q, call.k, call.v
    in_place = out.stride(3) == 1 or out.shape[3] == 1
    written = out if in_place else torch.empty_like(out, memory_format=torch.contiguous_format)
    mask, kind = call.attn_mask, None if call.mask_tiles is None else call.mask_tiles.kind
    batch, heads, q_len, dim = q.shape
    k_len, v_dim = k.shape[2], v.shape[3]
    n_q, n_k = tile_count(q_len, Q_TILE), tile_count(k_len, K_TILE)
    arch = launch.architecture(q.device)
    config = launch.attend_config(arch, dim, v_dim, q.element_size(), call.quantized)
    parts = Q_TILE // config.rows
    strides, unit = row_strides(q, k, v, written)
    strides = (*strides, *broadcast_strides(mask))
    sizes = (heads, heads // k.shape[1], q_len, k_len, n_q, n_k, call.scale)
    shared = {
        "UNIT": unit, "DIM": dim, "PADDED": launch.padded(dim), "V_DIM": v_dim, "V_PADDED": launch.padded(v_dim),
        "Q_TILE": Q_TILE, "K_TILE": K_TILE, "CHUNK": min(config.chunk, launch.padded(dim)), "CAUSAL": call.is_causal,
        "MASK": loop.NO_MASK if mask is None else loop.BOOL_MASK if mask.dtype == torch.bool else loop.FLOAT_MASK,
        "PRODUCT": launch.product(arch),
    }  # fmt: skip

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=q.device)

    skipped = new(n_q, parts, dtype=torch.int32) if call.skips else None
    spoiled, maximum = new(n_q, dtype=torch.int8), new(n_q * Q_TILE, dtype=torch.float32)
    launch.run(
        loop.attend_kernel, (batch * heads * n_q * parts,),
        q, k, v, mask, written, lse,
        call.queries.codes, call.queries.scale, call.queries.offset, call.queries.exact,
        call.keys.codes, call.keys.scale, call.keys.flags, kind,
        call.selection.tiles, call.selection.counts, call.selection.order, call.thresholds, skipped, spoiled, maximum,
        *strides, *broadcast_strides(kind), *sizes, math.log(PV_DROP_BUDGET / k_len),
        **shared, ROWS=config.rows, QUANTIZED=call.quantized,
        HOLD_Q=q.element_size() == 2 and launch.padded(dim) <= 128, STAGE_2=call.skips, LSE=lse is not None,
        LOOP_STAGES=config.stages, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    launch.run(
        spread_non_finite_kernel, (batch * heads * n_q,),
        q, k, v, mask, written, call.keys.flags, call.selection.tiles, call.selection.counts, spoiled, maximum,
        *strides, *sizes, **shared, FEW=16, num_warps=8,
    )  # fmt: skip
    if written is not out:
        out.copy_(written)
    return skipped


def statistics(selection: Selection, skipped: Tensor | None, q_len: int) -> tuple[Tensor, Tensor]:
    """Density and pv_skipped, fp32 [B, Hq], of what was selected and skipped."""
    totals = selection.counts.sum(2)  # int64 [B, Hq, 3]
    computed, visible = totals[..., 0] + totals[..., 1], totals[..., 2]
    density = torch.where(visible > 0, computed / visible, 1).float()
    if skipped is None:
        return density, torch.zeros_like(density)
    parts = skipped.shape[3]
    empty = parts - tile_count((q_len - 1) % Q_TILE + 1, Q_TILE // parts)  # of the last query tile
    products = computed * parts - empty * selection.counts[:, :, -1, :2].sum(-1)
    return density, (skipped.sum((2, 3)) / products.clamp(min=1)).float()


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
