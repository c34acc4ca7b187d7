"""Site + policy -> `Claim`, or `Refusal` with a reason. Reads the graph, edits nothing, puts no guard on a length.

A site is claimed only when every condition is known to hold; everything else keeps its original node.
Numbers that TorchDynamo made symbolic but that are constants of an architecture (a scale, a number of heads) are
guarded on, so that they can be known.
"""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import RESHAPED_IN_PLACE, reshaped_in_place, written_after_a_read
from sparge_compile.masks import mask_meaning
from sparge_compile.operands import Operand, keeps_digits
from sparge_compile.policy import Policy
from sparge_compile.repeated_heads import unrepeat
from sparge_compile.site import NEEDS_GRADIENT, AttentionSite, Claim, Mask, Refusal
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
    if site.piece is not None:
        written = written | site.piece.written
    try:
        return _claim(site, policy, written)
    except _Refused as refused:
        return refused.refusal


def _claim(site: AttentionSite, policy: Policy, written: set[fx.Node]) -> Claim:
    _check_requested(site, policy)
    query, key, value, output = site.query, site.key, site.value, site.output
    if site.unmatched is not None or query is None or key is None or value is None or output is None:
        raise _Refused(site.unmatched or "the call's query, key and value could not be read")
    operands = (query, key, value, output, *(mask.operand for mask in site.masks))
    if any(reshaped_in_place(operand.node) for operand in operands):
        raise _Refused(RESHAPED_IN_PLACE)
    _check_tensors({"query": query, "key": key, "value": value}, output)
    _check_dropout(site)
    masks, is_causal = _read_masks(site, query, key, output, written)
    key, value, shares_heads = _heads(site, query, key, value, written)
    if site.several_nodes:
        _check_unchanged({"query": query, "key": key, "value": value}, masks, output, written)
        _check_finite(_scale(site.scale))
    return Claim(
        site=site,
        query=query,
        key=key,
        value=value,
        output=output,
        masks=masks,
        is_causal=is_causal,
        scale=_scale(site.scale),
        enable_gqa=shares_heads,
        dtype=dynamo.example(output.node).dtype,
        precision=_precision(policy),
    )


def _check_requested(site: AttentionSite, policy: Policy) -> None:
    for pattern in policy.dense:
        if fnmatch.fnmatchcase(site.name, pattern) or (
            site.other_name and fnmatch.fnmatchcase(site.other_name, pattern)
        ):
            raise _Refused(f"the policy keeps it dense (dense pattern {pattern!r})", requested=True)


def _check_tensors(inputs: dict[str, Operand], output: Operand) -> None:
    result = dynamo.example(output.node)
    # The output's flag and dtype are exact: they know no_grad regions and ambient autocast, the inputs' do not.
    if result.requires_grad:
        raise _Refused(NEEDS_GRADIENT)
    for name, operand in inputs.items():
        _check_plain(name, operand, result.device)
    unsupported = ops.check_static(head_dim=1, value_head_dim=1, dtype=result.dtype, device=result.device)
    if unsupported is not None:
        raise _Refused(unsupported)


def _check_plain(name: str, operand: Operand, device: torch.device) -> None:
    tensor = dynamo.example(operand.node)
    if not dynamo.is_plain(tensor):
        raise _Refused(f"the {name} is not a plain strided tensor ({type(tensor).__name__}, {tensor.layout})")
    if tensor.device != device:
        raise _Refused(f"the {name} is on {tensor.device}, the output on {device}")


def _check_unchanged(
    inputs: dict[str, Operand], masks: tuple[Mask, ...], output: Operand, written: set[fx.Node]
) -> None:
    """The operator reads everything where the last node of the call was."""
    for name, operand in (*inputs.items(), *(("mask", mask.operand) for mask in masks)):
        if operand.node in written and written_after_a_read(operand.node, output.node):
            raise _Refused(f"the {name} may be written in place after a part of the call has read it")


def _check_finite(scale: float | None) -> None:
    if scale is not None and not math.isfinite(scale):
        raise _Refused(f"the scale is {scale}")


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
    scale = dynamo.specialize(dynamo.example(scale) if isinstance(scale, fx.Node) else scale)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise _Refused("scale is not a constant number (a tensor, or a value that changes from call to call)")
    return float(scale)


def _read_masks(
    site: AttentionSite, query: Operand, key: Operand, output: Operand, written: set[fx.Node]
) -> tuple[tuple[Mask, ...], bool]:
    """(the masks that the kernel needs, whether the call is causal) once what masks mean is read."""
    is_causal = _constant(site.is_causal, bool, "is_causal")
    if not site.masks:
        return (), is_causal
    if is_causal:
        raise _Refused(
            "attn_mask and is_causal=True are given together; what that means differs between torch versions"
        )
    outer = {} if site.piece is None else site.piece.inputs
    meanings = [mask_meaning(mask, query.shape[2], key.shape[2], written, outer).kind for mask in site.masks]
    if all(kind in ("all_true", "causal") for kind in meanings):
        return (), "causal" in meanings
    for mask in site.masks:
        _check_mask(mask, site, query, output)
    needed = zip(site.masks, meanings, strict=True)
    return tuple(mask for mask, kind in needed if kind != "all_true"), False


def _check_mask(mask: Mask, site: AttentionSite, query: Operand, output: Operand) -> None:
    tensor, result = dynamo.example(mask.operand.node), dynamo.example(output.node)
    _check_plain("attn_mask", mask.operand, result.device)
    if tensor.dtype in (torch.bool, result.dtype):
        return
    if site.several_nodes:
        if not keeps_digits(tensor.dtype, result.dtype):
            raise _Refused(f"the mask is {tensor.dtype}, the output {result.dtype}: it would lose digits")
        return
    # Autocast makes a mask of floats what it makes of the query.
    autocast = dynamo.example(query.node).dtype != result.dtype
    if not (autocast and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)):
        raise _Refused(f"attn_mask is {tensor.dtype}; bool and the query's {result.dtype} are supported")


def _heads(
    site: AttentionSite, query: Operand, key: Operand, value: Operand, written: set[fx.Node]
) -> tuple[Operand, Operand, bool]:
    """(key, value, do query heads share them), repetition seen through."""
    enable_gqa = _constant(site.enable_gqa, bool, "enable_gqa")
    q_heads, k_heads, v_heads = (dynamo.specialize(x.shape[1]) for x in (query, key, value))
    if q_heads is None or k_heads is None or k_heads != v_heads:
        raise _Refused(f"the numbers of heads are not fixed or do not fit ({q_heads}, {k_heads}, {v_heads})")
    if q_heads != k_heads:
        # Without enable_gqa the call broadcasts one head over all, which is the same as sharing it.
        if not (enable_gqa or k_heads == 1) or k_heads == 0 or q_heads % k_heads:
            raise _Refused(f"{q_heads} query heads over {k_heads} key heads (enable_gqa={enable_gqa})")
        return key, value, True
    single_key, key_repeats = unrepeat(key, written)
    single_value, value_repeats = unrepeat(value, written)
    if key_repeats == value_repeats and key_repeats > 1:
        return single_key, single_value, True
    return key, value, False


def _precision(policy: Policy) -> str:
    if policy.precision == "fp8":
        raise _Refused("precision='fp8' has no kernel yet; use 'auto' or 'int8'")
    return "int8" if policy.precision == "auto" else policy.precision
