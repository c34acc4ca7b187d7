"""Ways to compute one attention call on a GPU, and the steps of the project's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparge_compile.bench.block_mask import kept_tiles
from sparge_compile.bench.peers import OURS, Call, Peer, flex, sparge
from sparge_compile.bench.problem import Problem
from sparge_kernels.thresholds import K_TILE, Q_TILE

# FlexAttention's own choice for head dim 64 on Hopper, 128 keys a step, refuses tiles of 64 keys.
FLEX_OPTIONS = {"BLOCK_M": Q_TILE, "BLOCK_N": K_TILE}


def default_sdpa(problem: Problem) -> Call:
    """`F.scaled_dot_product_attention`, whatever it chooses."""
    q, k, v = problem.inputs
    options: dict[str, Any] = {"is_causal": problem.is_causal, "enable_gqa": problem.group > 1}
    return lambda: F.scaled_dot_product_attention(q, k, v, **options)


def sdpa(backend: SDPBackend) -> Callable[[Problem], Call]:
    """`F.scaled_dot_product_attention` with one backend and no other."""

    def prepare(problem: Problem) -> Call:
        chosen = default_sdpa(problem)

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return chosen()

        return call

    return prepare


def sage(problem: Problem) -> Call:
    """SageAttention, dense in INT8, where the package is installed."""
    from sageattention import sageattn

    q, k, v = problem.inputs
    return lambda: sageattn(q, k, v, tensor_layout="HND", is_causal=problem.is_causal)


def prepare(problem: Problem) -> Any:
    """Stage 1 and quantization by the project's kernels: a `sparge_kernels.triton.Prepared`."""
    from sparge_kernels import triton

    _, heads, _, head_dim = problem.q.shape
    return triton.prepare(
        *problem.inputs,
        thresholds=[problem.choice.thresholds] * heads,
        attn_mask=None,
        is_causal=problem.is_causal,
        scale=head_dim**-0.5,
        precision=problem.precision,
        predictor=problem.choice.predictor,
    )


def selected_tiles(problem: Problem) -> Tensor:
    """The tiles that the project's kernels keep, bool [B, H, nQ, nK]."""
    selection = prepare(problem).selection
    return kept_tiles(selection.tiles, selection.counts)


def stages(problem: Problem) -> dict[str, Callable[[], object]]:
    """The project's kernels apart: "prepare" and "loop" are the whole call; "keys", "queries", "select": "prepare"."""
    from sparge_kernels import triton

    q, k, v = problem.inputs
    q_len, k_len, head_dim = q.shape[2], k.shape[2], q.shape[3]
    prepared = prepare(problem)
    out = torch.empty_permuted(
        (*q.shape[:3], v.shape[3]), (0, 2, 1, 3), dtype=q.dtype, device=q.device
    )  # the operator's layout
    options = {"is_causal": problem.is_causal, "scale": head_dim**-0.5}
    keys = {"quantized": problem.precision == "int8", "clustered": prepared.keys.clusters is not None}

    def select() -> object:
        weights = None
        if prepared.keys.clusters is not None:
            weights = triton.weigh_tiles(q, prepared.keys.clusters, None, k_len=k_len, **options)
        of_call = {"q_len": q_len, "k_len": k_len, "weights": weights, **options}
        return triton.select_tiles(prepared.queries, prepared.keys, None, prepared.thresholds, **of_call)

    return {
        "prepare": lambda: prepare(problem),
        "loop": lambda: triton.attend(prepared, out),
        "keys": lambda: triton.prepare_keys(k, v, is_causal=problem.is_causal, **keys),
        "queries": lambda: triton.prepare_queries(q, prepared.keys.centre, problem.group, sign=1),
        "select": select,
    }


GPU_PEERS = {
    "dense default": Peer(default_sdpa, sparse=False, reference_limit=2e-2),
    "dense cudnn": Peer(sdpa(SDPBackend.CUDNN_ATTENTION), sparse=False, reference_limit=2e-2),
    "dense flash": Peer(sdpa(SDPBackend.FLASH_ATTENTION), sparse=False, reference_limit=2e-2),
    "dense sage": Peer(sage, sparse=False, exact_limit=0.1),  # INT8, and values in FP8 where it can
    OURS: Peer(sparge, sparse=True, reference_limit=1e-2, centring="call"),
    "flex": Peer(flex(selected_tiles, FLEX_OPTIONS), sparse=True),
}
