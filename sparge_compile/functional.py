"""`attention`: the kernel itself behind the signature of `F.scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile import dynamo
from sparge_compile.policy import Policy, replace
from sparge_compile.site import StrictPolicyError
from sparge_compile.thresholds import from_policy
from sparge_kernels import ops
from sparge_kernels.thresholds import pack


class AttentionStats(NamedTuple):
    """What a call did, as tensors (reading them is the caller's host sync, not ours).

    density: fp32, the query's leading dimensions (batch, heads): share of the visible tiles that were computed.
    pv_skipped: same shape: share of the computed tiles whose P V product was skipped.
    """

    density: Tensor
    pv_skipped: Tensor


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    policy: Policy | None = None,
    return_stats: Literal[False] = False,
    **fields: Any,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    policy: Policy | None = None,
    return_stats: Literal[True],
    **fields: Any,
) -> tuple[Tensor, AttentionStats]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    policy: Policy | None = None,
    return_stats: bool = False,
    **fields: Any,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Sparse, quantized attention with the contract of `F.scaled_dot_product_attention` (SpargeAttn, section 3).

    Args:
        q: [..., q_heads, q_len, head_dim], fp32, bf16 or fp16.
        k, v: [..., kv_heads, k_len, head_dim], same dtype and device.
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as there. Causal is aligned top-left.
        policy: thresholds and limits; None is `Policy()`. `rewriting` contexts select policies for compiled models
            and do not reach this function. `dense` and `profile` name sites, so they have no effect here, and
            `min_tokens=None` is no minimum: the call asked for this kernel. So it does in a region of
            `torch.nn.attention.sdpa_kernel`, which chooses among torch's kernels for what is done densely.
        return_stats: also return `AttentionStats`.
        **fields: policy fields to change.

    Returns:
        [..., q_heads, q_len, value head_dim] in q's dtype, or (that, stats).
        What cannot be done sparsely (dropout, a needed gradient, an unsupported dtype, size or device) is
        done by `F.scaled_dot_product_attention`, with density 1.

    Raises:
        StrictPolicyError: the policy is strict and the call cannot be done sparsely.
        ValueError, TypeError: a policy field that does not exist or is out of range.
    """
    q, k, v = (_autocast(x) for x in (q, k, v))
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r}: must be a sparge_compile.Policy; fields can be given as keywords instead.")
    chosen = Policy() if policy is None else policy
    if fields:
        chosen = replace(chosen, fields)
    reason = (
        "the policy is disabled"
        if not chosen.enabled
        else _why_dense(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa)
    )
    if reason is None and isinstance(scale, Tensor):
        reason = "scale is a tensor"
    if reason is None and chosen.precision == "fp8":
        reason = "precision='fp8' has no kernel yet; use 'auto' or 'int8'"
    # An exported program serves other lengths than those it was traced with: there the operator decides, call by call.
    short = not _is_exporting() and min(q.shape[-2], k.shape[-2]) < (chosen.min_tokens or 0)
    if reason is None and not short:
        reason = _unavailable(q.device, attn_mask is not None)
    if reason is not None or short:
        if reason is not None and chosen.enabled and chosen.strict:
            raise StrictPolicyError(f"strict=True, and this call cannot be done sparsely: {reason}.")
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        if not return_stats:
            return out
        density = torch.ones(q.shape[:-2], dtype=torch.float32, device=q.device)
        return out, AttentionStats(density, torch.zeros_like(density))
    return _sparse(q, k, v, attn_mask, chosen, is_causal, scale, enable_gqa, return_stats)


@torch.compiler.assume_constant_result  # compiled code asks once; if the answer changes, the operator warns, runs dense
def _unavailable(device: torch.device, has_mask: bool) -> str | None:
    return ops.unavailable(device, has_mask)


@torch.compiler.assume_constant_result  # tracing with torch 2.11 takes the function itself for True
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # TorchDynamo enters the transforms inside a graph, and compiles none around it
def _is_transforming() -> bool:
    return dynamo.is_transforming()


@torch.compiler.assume_constant_result  # TorchDynamo of 2.11 does not know the function
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _autocast(x: Tensor) -> Tensor:
    """What ambient autocast makes of an input of scaled_dot_product_attention."""
    device = x.device.type
    if (
        not _has_autocast(device)
        or not torch.is_autocast_enabled(device)
        or not x.is_floating_point()
        or x.dtype == torch.float64
    ):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _why_dense(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> str | None:
    if dropout_p != 0:
        return f"dropout is active (dropout_p={dropout_p})"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "a gradient is needed and the kernel has no backward; run it under torch.no_grad()"
    if dynamo.is_forward_mode() or _is_transforming():
        return "a torch.func transform or forward-mode differentiation is active"
    if any(x.is_nested or x.layout != torch.strided for x in (q, k, v)):
        return "q, k or v is not a dense tensor"
    if min(q.dim(), k.dim(), v.dim()) < 2 or not q.dim() == k.dim() == v.dim():
        return f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions"
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        return f"q, k and v differ in dtype or device ({kinds})"
    if q.shape[:-3] != k.shape[:-3] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        return f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} need broadcasting"
    if q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        q_heads, k_heads = q.shape[-3], k.shape[-3]
        if not enable_gqa or k_heads == 0 or q_heads % k_heads:
            return f"{q_heads} query heads over {k_heads} key heads (enable_gqa={enable_gqa})"
    if attn_mask is not None:
        reason = _why_mask_is_dense(attn_mask, (*q.shape[:-1], k.shape[-2]), q, is_causal)
        if reason is not None:
            return reason
    return ops.check_static(q.shape[-1], v.shape[-1], q.dtype, q.device)


def _why_mask_is_dense(attn_mask: Tensor, shape: tuple[int, ...], q: Tensor, is_causal: bool) -> str | None:
    if is_causal:
        return "attn_mask and is_causal=True are given together"
    if torch.is_grad_enabled() and attn_mask.requires_grad:
        return "attn_mask needs a gradient and the kernel has no backward; run it under torch.no_grad()"
    if attn_mask.is_nested or attn_mask.layout != torch.strided or attn_mask.device != q.device:
        return "attn_mask is not a dense tensor on the query's device"
    if attn_mask.dtype not in (torch.bool, q.dtype):
        return f"attn_mask is {attn_mask.dtype}; bool and the query's {q.dtype} are supported"
    sizes = (1,) * (len(shape) - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(sizes) != len(shape) or any(size not in (1, wanted) for size, wanted in zip(sizes, shape, strict=True)):
        return f"attn_mask of shape {tuple(attn_mask.shape)} does not broadcast to {shape}"
    return None


def _sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    policy: Policy,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_stats: bool,
) -> Tensor | tuple[Tensor, AttentionStats]:
    leading = q.shape[:-2]
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (q.dim() - attn_mask.dim())]
        if q.dim() > 4:  # batch dimensions are flattened to one: so must the mask's be
            attn_mask = attn_mask.expand(*leading[:-1], *attn_mask.shape[-3:])
        attn_mask = _four_dimensions(attn_mask)
    q, k, v = (_four_dimensions(x) for x in (q, k, v))
    choice = from_policy(policy, is_causal)
    operator = torch.ops.sparge.attention_with_stats if return_stats else torch.ops.sparge.attention
    result = operator(
        q,
        k,
        v,
        attn_mask,
        thresholds=pack(choice.thresholds),
        predictor=choice.predictor,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        precision="int8" if policy.precision == "auto" else policy.precision,
        min_tokens=policy.min_tokens,
    )
    if not return_stats:
        return result.reshape(*leading, *result.shape[-2:])
    out, density, pv_skipped = result
    stats = AttentionStats(density.reshape(leading), pv_skipped.reshape(leading))
    return out.reshape(*leading, *out.shape[-2:]), stats


def _four_dimensions(x: Tensor) -> Tensor:
    """[..., heads, tokens, dim] as [batch, heads, tokens, dim]; the missing dimensions are 1."""
    if x.dim() > 4:
        return x.flatten(0, -4)
    return x[(None,) * (4 - x.dim())]
