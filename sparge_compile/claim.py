"""Site + policy -> `Claim`, or `Refusal` with a reason. Reads the graph, edits nothing, puts no guard on a length.

A site is claimed only when every condition is known to hold; everything else keeps its original node.
Numbers that TorchDynamo made symbolic but that are constants of an architecture (a scale, a number of heads) are
guarded on, so that they can be known.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import reshaped_in_place
from sparge_compile.masks import mask_meaning
from sparge_compile.policy import Policy
from sparge_compile.repeated_heads import unrepeat
from sparge_compile.site import AttentionSite, Claim, Refusal
from sparge_kernels import ops


class _Refused(Exception):
    def __init__(self, reason: str, *, requested: bool = False) -> None:
        self.refusal = Refusal(reason, requested)


def claim(site: AttentionSite, policy: Policy, written: set[fx.Node]) -> Claim | Refusal:
    """Decides one site.

    Args:
        site: what a matcher read.
        policy: the policy in force.
        written: nodes whose storage may be written in place (`graph.written_nodes`).
    """
    try:
        return _claim(site, policy, written)
    except _Refused as refused:
        return refused.refusal


def _claim(site: AttentionSite, policy: Policy, written: set[fx.Node]) -> Claim:
    _check_requested(site, policy)
    if site.unmatched is not None or site.query is None or site.key is None or site.value is None:
        raise _Refused(site.unmatched or "the call's query, key and value could not be read")
    if any(reshaped_in_place(node) for node in (site.node, site.query, site.key, site.value)):
        raise _Refused("a tensor of the call changes its shape or strides in place (transpose_, squeeze_, ...)")
    output = _fake(site.node)
    query, key, value = (_fake(node) for node in (site.query, site.key, site.value))
    _check_tensors(output, query, key, value)
    _check_dropout(site)
    is_causal = _constant(site.is_causal, bool, "is_causal")
    if site.attn_mask is not None:
        is_causal = _read_mask(site, query, key, written, is_causal)
    key_node, value_node, shares_heads = _heads(site, query, key, value, written)
    return Claim(
        site=site,
        query=site.query,
        key=key_node,
        value=value_node,
        is_causal=is_causal,
        scale=_scale(site.scale),
        enable_gqa=shares_heads,
        dtype=output.dtype,
        precision=_precision(policy),
    )


def _check_requested(site: AttentionSite, policy: Policy) -> None:
    for pattern in policy.dense:
        if fnmatch.fnmatchcase(site.name, pattern):
            raise _Refused(f"the policy keeps it dense (dense pattern {pattern!r})", requested=True)


def _fake(node: fx.Node) -> torch.Tensor:
    value = dynamo.example(node)
    if not isinstance(value, torch.Tensor):
        raise _Refused(f"{node.name} is not one tensor in the graph")
    return value


def _check_tensors(output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    # The output's flag and dtype are exact: they know no_grad regions and ambient autocast, the inputs' do not.
    if output.requires_grad:
        raise _Refused("a gradient is needed here and the kernel has no backward; run it under torch.no_grad()")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not dynamo.is_plain(tensor):
            raise _Refused(f"the {name} is not a plain strided tensor ({type(tensor).__name__}, {tensor.layout})")
        if tensor.dim() != 4:
            raise _Refused(f"the {name} has {tensor.dim()} dimensions; [batch, heads, tokens, head_dim] is supported")
        if tensor.device != output.device:
            raise _Refused(f"the {name} is on {tensor.device}, the output on {output.device}")
    unsupported = ops.check_static(head_dim=1, value_head_dim=1, dtype=output.dtype, device=output.device)
    if unsupported is not None:
        raise _Refused(unsupported)


def _check_dropout(site: AttentionSite) -> None:
    dropout = site.dropout_p
    if isinstance(dropout, fx.Node):
        dropout = dynamo.specialize(dynamo.example(dropout))
    if not isinstance(dropout, (int, float)) or dropout != 0:
        raise _Refused(f"dropout is active (dropout_p={dropout}); call model.eval() or set it to 0")


def _constant(value: Any, kind: type, name: str) -> Any:
    if isinstance(value, fx.Node):
        value = dynamo.specialize(dynamo.example(value))
    if not isinstance(value, kind):
        raise _Refused(f"{name} is not a constant")
    return value


def _scale(scale: Any) -> float | None:
    """The scale as a number. A symbolic one (a lifted module attribute) is guarded on; a tensor stays dense."""
    if scale is None:
        return None
    if isinstance(scale, fx.Node):
        scale = dynamo.specialize(dynamo.example(scale))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise _Refused("scale is not a constant number (a tensor, or a value that changes from call to call)")
    return float(scale)


def _read_mask(
    site: AttentionSite, query: torch.Tensor, key: torch.Tensor, written: set[fx.Node], is_causal: bool
) -> bool:
    """Whether the call is causal once its mask is read; refuses a mask that means anything else."""
    if is_causal:
        raise _Refused(
            "attn_mask and is_causal=True are given together; what that means differs between torch versions"
        )
    if not isinstance(site.attn_mask, fx.Node) or not isinstance(dynamo.example(site.attn_mask), torch.Tensor):
        raise _Refused("attn_mask is not a tensor of the graph")
    meaning = mask_meaning(site.attn_mask, query.shape[2], key.shape[2], written)
    if meaning.kind not in ("causal", "all_true"):
        raise _Refused(f"attn_mask is not plain causal or all true ({meaning.detail}); masks are not supported yet")
    return meaning.kind == "causal"


def _heads(
    site: AttentionSite, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, written: set[fx.Node]
) -> tuple[fx.Node, fx.Node, bool]:
    """(key node, value node, do query heads share them), repetition seen through."""
    assert site.key is not None and site.value is not None
    enable_gqa = _constant(site.enable_gqa, bool, "enable_gqa")
    q_heads, k_heads, v_heads = (dynamo.specialize(x.shape[1]) for x in (query, key, value))
    if q_heads is None or k_heads is None or k_heads != v_heads:
        raise _Refused(f"the numbers of heads are not fixed or do not fit ({q_heads}, {k_heads}, {v_heads})")
    if q_heads != k_heads:
        if not enable_gqa or k_heads == 0 or q_heads % k_heads:
            raise _Refused(f"{q_heads} query heads over {k_heads} key heads (enable_gqa={enable_gqa})")
        return site.key, site.value, True
    key_node, key_repeats = unrepeat(site.key, written)
    value_node, value_repeats = unrepeat(site.value, written)
    if key_repeats == value_repeats and key_repeats > 1:
        return key_node, value_node, True
    return site.key, site.value, False


def _precision(policy: Policy) -> str:
    if policy.precision == "fp8":
        raise _Refused("precision='fp8' has no kernel yet; use 'auto' or 'int8'")
    return "int8" if policy.precision == "auto" else policy.precision
