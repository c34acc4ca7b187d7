"""The fused calls of PyTorch's fast paths: a whole encoder layer, or a whole multi-head attention, as one operator.

TransformerEncoderLayer takes `_transformer_encoder_layer_fwd` in eval mode without gradients. Such an operator is C++
that no tracing sees into, so what it computes is stated here, and compared with the operator itself, on small
inputs, before the first call with the same flags is claimed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparge_compile import dynamo
from sparge_compile.matchers.opaque import RETURNS_WEIGHTS, site_of
from sparge_compile.pieces import Writer, first_result, only_first_is_used
from sparge_compile.site import AttentionSite

_PER_PAIR, _PER_KEY, _PER_HEAD = 0, 1, 2  # mask types: [L, L], [B, L] and [B, H, L, L]


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Tensor:
    """The output of `_native_multi_head_attention`, [B, L, E], but 0 instead of NaN for a query that has no key."""
    if query is key and key is value:
        projected = F.linear(query, qkv_weight, qkv_bias).chunk(3, dim=-1)
    else:
        parts = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        projected = tuple(F.linear(*part) for part in parts)
    q, k, v = (x.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for x in projected)
    out = F.scaled_dot_product_attention(q, k, v, None if mask is None else _attended(mask, mask_type))
    return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)


def _attended(mask: Tensor, mask_type: int | None) -> Tensor:
    """The mask as scaled_dot_product_attention takes it. The fused operators hide whatever is not zero, also floats."""
    # TransformerEncoderLayer repeats a mask of pairs for every head: what is repeated is computed once.
    once = mask[tuple(slice(1) if _is_zero(stride) else slice(None) for stride in mask.stride())]
    attended = once.to(torch.bool).logical_not().expand(mask.shape)
    return attended[:, None, None] if mask_type == _PER_KEY else attended


def _is_zero(stride: dynamo.Size) -> bool:
    return isinstance(stride, int) and stride == 0


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """The output of `_transformer_encoder_layer_fwd`, [B, L, E], but attention is 0, not NaN, without a key."""

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Tensor) -> Tensor:
        projections = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return multi_head_attention(x, x, x, embed_dim, num_heads, *projections, mask, mask_type=mask_type)

    def feed_forward(x: Tensor) -> Tensor:
        # The operator that the fused one calls: on GPUs its gelu is the tanh approximation.
        inner = dynamo.addmm_activation(ffn_bias_1, x.flatten(0, 1), ffn_weight_1.t(), use_gelu=use_gelu)
        return F.linear(inner.unflatten(0, x.shape[:2]), ffn_weight_2, ffn_bias_2)

    if norm_first:
        after = src + attend(norm_1(src))
        return (after + feed_forward(norm_2(after))).contiguous()
    after = norm_1(src + attend(src))
    return norm_2(after + feed_forward(after)).contiguous()


WRITTEN_OUT: dict[Any, Callable[..., Tensor]] = {
    dynamo.FUSED_ENCODER_LAYER: encoder_layer,
    dynamo.FUSED_MULTI_HEAD_ATTENTION: multi_head_attention,
}


def match(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every fused call, written out."""
    writer = Writer()
    return [_site(node, writer) for node in gm.graph.nodes if node.op == "call_function" and node.target in WRITTEN_OUT]


def _site(node: fx.Node, writer: Writer) -> AttentionSite:
    function = WRITTEN_OUT[node.target]
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except TypeError as error:
        return AttentionSite(node, "mha", unmatched=f"the call has arguments this release does not know: {error}")
    bound.apply_defaults()
    given = bound.arguments
    unmatched = _unmatched(node, given)
    if unmatched is not None:
        return AttentionSite(node, "mha", unmatched=unmatched)
    # The operator returns contiguous memory whatever its fake says: of a transposed input (seen, 2.11 to 2.15).
    result = first_result(node)
    expected = result.contiguous() if isinstance(result, torch.Tensor) else result
    return site_of(writer, node, expected, function, list(given.values()), empty_rows="nan")


def _unmatched(node: fx.Node, given: dict[str, Any]) -> str | None:
    if not only_first_is_used(node):
        return RETURNS_WEIGHTS
    mask, mask_type = given["mask"], given["mask_type"]
    if mask is not None:
        rank = {_PER_PAIR: 2, _PER_KEY: 2, _PER_HEAD: 4}.get(mask_type)
        if rank != dynamo.example(mask).dim():
            return f"a mask with {dynamo.example(mask).dim()} dimensions of type {mask_type} is not known"
    flags = (given.get("use_gelu", False), given.get("norm_first", False))
    if not is_proven(node.target, None if mask is None else mask_type, *flags):
        return "this torch version's fused operator could not be proven equal to what is known of it"
    return None


@functools.cache
def is_proven(fused: Callable[..., Any], mask_type: int | None, use_gelu: bool, norm_first: bool) -> bool:
    """Does a fused operator compute what is stated above? Both run on small random inputs, on the CPU."""
    try:
        with dynamo.real_tensors(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _agrees(fused, mask_type, use_gelu, norm_first)
    except Exception:  # whatever a torch whose operators take other arguments raises: nothing is proven
        return False


def _agrees(fused: Callable[..., Any], mask_type: int | None, use_gelu: bool, norm_first: bool) -> bool:
    mask, has_key = _small_mask(mask_type)
    chosen = {"use_gelu": use_gelu, "norm_first": norm_first, "mask": mask, "mask_type": mask_type, "eps": 1e-5}
    written_out = WRITTEN_OUT[fused]
    names = inspect.signature(written_out).parameters
    given = {**_small_tensors(), "embed_dim": 8, "num_head": 2, "num_heads": 2, **chosen}
    given |= {"need_weights": False, "average_attn_weights": True}
    arguments = [given[name] for name in names]
    whole, found = fused(*arguments), written_out(*arguments)
    expected = whole[0] if isinstance(whole, tuple) else whole
    close = torch.allclose(expected[has_key], found[has_key], rtol=1e-4, atol=1e-5)
    return close and bool(expected[~has_key].isnan().all())


def _small_mask(mask_type: int | None) -> tuple[Tensor | None, Tensor]:
    """(a mask of 2 sequences of 5 with 2 heads, True hides; the queries that it leaves a key in every head, [2, 5])."""
    has_key = torch.ones(2, 5, dtype=torch.bool, device="cpu")
    if mask_type is None:
        return None, has_key
    shape = {_PER_PAIR: (5, 5), _PER_KEY: (2, 5), _PER_HEAD: (2, 2, 5, 5)}[mask_type]
    mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
    mask[..., 0, 3:] = True
    if mask_type == _PER_HEAD:
        mask[0, 1, 2, 1:4] = mask[1, 0, 4] = True
        has_key[1, 4] = False
    else:
        mask[1] = True  # of a query, or of all of the second sequence
        has_key[(slice(None), 1) if mask_type == _PER_PAIR else 1] = False
    return mask, has_key


def _small_tensors() -> dict[str, Tensor]:
    """Random tensors for every parameter of the operators; the random state of the process stays as it is."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    x = random(2, 5, 8)
    tensors = {"src": x, "query": x, "key": x, "value": x}
    shapes = {"qkv": 24, "proj": 8, "ffn_1": 12, "ffn_2": 8, "norm_1": 8, "norm_2": 8}
    for name, size in shapes.items():
        layer, _, number = name.partition("_")
        suffix = f"_{number}" if number else ""
        inner = 12 if name == "ffn_2" else 8
        weight = random(size) if layer == "norm" else random(size, inner)
        tensors |= {f"{layer}_weight{suffix}": weight, f"{layer}_bias{suffix}": random(size)}
    return tensors
