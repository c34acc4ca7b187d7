"""Plain data that crosses files: an attention site, what was decided about it, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from sparge_compile.operands import Operand
from sparge_compile.pieces import Piece
from sparge_kernels.thresholds import Thresholds

NEEDS_GRADIENT = "a gradient is needed here and the kernel has no backward; run it under torch.no_grad()"


@dataclass(frozen=True)
class Mask:
    """One mask of a call, [batch, heads, queries, keys], each size full or 1.

    Boolean: True is "attend", or "hidden" with `hides`. Floating point: added to the scores, in nats.
    """

    operand: Operand
    hides: bool = False


@dataclass(frozen=True)
class AttentionSite:
    """One attention call in a graph, as a matcher read it. Nodes keep their symbolic sizes; nothing is decided yet.

    Attributes:
        node: the node whose output is the attention output.
        pattern: `sdpa`, `mha`, `softmax`, `opaque` (another library's kernel), or `not_attention` (looks like it).
        name: module name, `:1`, `:2` appended where one module has several.
        other_name: of the same call where torch takes its other path: nn.TransformerEncoderLayer's fast path is a call
            of the layer, its slow path one of the layer's `self_attn`. Empty for other calls.
        source: `file:line` of the call in user code, or an empty string.
        query, key, value, output: the tensors of the call; None where the pattern does not expose them.
        masks: all of them hold.
        dropout_p, is_causal, scale, enable_gqa: the arguments as given: constants, or nodes.
        unmatched: why the matcher could not read the call, or None.
        piece: where `node` is an opaque call, what it computes; the tensors of the call are nodes of its graph.
        several_nodes: the call is several nodes and not one. What it reads must not change between them, it is proven
            equal before it is rewritten (proof.py), and no operand may lose digits.
        empty_rows: what queries give that may attend to nothing: `zero` (as SDPA does), `nan`, or the `mean` of the
            values of all keys.
    """

    node: fx.Node
    pattern: str
    name: str = ""
    other_name: str = ""
    source: str = ""
    query: Operand | None = None
    key: Operand | None = None
    value: Operand | None = None
    output: Operand | None = None
    masks: tuple[Mask, ...] = ()
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    unmatched: str | None = None
    piece: Piece | None = None
    several_nodes: bool = False
    empty_rows: Literal["zero", "nan", "mean"] = "zero"


@dataclass(frozen=True)
class Refusal:
    """Why a site stays dense, in words a user can act on. `requested` marks what the user asked for."""

    reason: str
    requested: bool = False


@dataclass(frozen=True)
class Claim:
    """A site that the kernel can serve with the meaning the call has.

    `key` and `value` have their own head count: a repetition for GQA has been seen through. `masks` are those that the
    kernel needs: what is open everywhere is left out, and so is one that `is_causal` says.
    """

    site: AttentionSite
    query: Operand
    key: Operand
    value: Operand
    output: Operand
    masks: tuple[Mask, ...]
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    dtype: torch.dtype
    precision: str


@dataclass(frozen=True)
class Decision:
    """A claim with the thresholds to use.

    Attributes:
        thresholds: one entry for all heads or one per query head; empty with a table.
        predictor: the one the thresholds belong to.
        source: who set them: `policy`, `rule NAME`, `profile` or `attached profile`.
        expected_density: share of the visible tiles that will be computed, where something is known of it.
        bucket: the lengths the decision holds for, in words.
        min_tokens: below this many queries or keys the operator itself runs dense; 0 where a shape guard decides.
        table: int64 [1 or query heads, 4], an input of the graph that holds the bits of fp64 thresholds; or None.
    """

    claim: Claim
    thresholds: tuple[Thresholds, ...]
    predictor: str
    source: str
    expected_density: float | None = None
    bucket: str = ""
    min_tokens: int = 0
    table: fx.Node | None = None


class StrictPolicyError(RuntimeError):
    """A `strict` policy met an attention call that cannot be rewritten."""
