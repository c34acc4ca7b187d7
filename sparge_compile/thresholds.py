"""Claim + policy -> `Decision`, or `Refusal`. The only place where guards on sizes are born.

Each comparison here splits the compiled variants in two, so there are few: a length against `min_tokens`, and the
sizes a kernel is built for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparge_compile import dynamo
from sparge_compile.dynamo import Size
from sparge_compile.operands import Operand
from sparge_compile.policy import Policy
from sparge_compile.rules import break_even, rule_for
from sparge_compile.site import Claim, Decision, Refusal
from sparge_kernels import ops
from sparge_kernels.thresholds import Thresholds


def decide(claim: Claim, policy: Policy) -> Decision | Refusal:
    """Chooses thresholds for a claimed site, guarding the graph on what the choice depends on."""
    query, key, device = claim.query, claim.key, dynamo.example(claim.output.node).device
    refusal = _check_sizes(query, key, claim.value, device) or _check_masks(claim)
    if refusal is not None:
        return refusal
    kept_dense = _kept_dense(claim, policy)
    if kept_dense is not None:
        return Refusal(f"the profile keeps it dense ({kept_dense})", requested=True)
    minimum = min_tokens(policy, device, claim.precision, _has_bias(claim))
    long_enough = _reaches(query.shape[2], key.shape[2], minimum)
    if long_enough is False:
        q_len, k_len = dynamo.hint(query.shape[2]), dynamo.hint(key.shape[2])
        lengths = f"{q_len} {'query' if q_len == 1 else 'queries'} and {k_len} {'key' if k_len == 1 else 'keys'}"
        return Refusal(f"{lengths}, min_tokens is {minimum}: sparse attention does not pay on short calls")
    choice = _choose(claim, policy)
    unmeasured = ops.unmeasured(device, claim.dtype, claim.precision) if policy.min_tokens is None else None
    if unmeasured is not None:
        return Refusal(f"{unmeasured}; set min_tokens to the length from which it pays here")
    unavailable = ops.unavailable(device, bool(claim.masks))
    if unavailable is not None:
        return Refusal(unavailable)
    heads, entries = query.shape[1], len(choice.thresholds)
    if entries > 1 and not dynamo.known(heads == entries):
        return Refusal(f"the profile has {entries} heads for this site, the call has {heads}")
    return Decision(
        claim,
        choice.thresholds,
        choice.predictor,
        choice.source,
        choice.expected_density,
        bucket=f"{minimum} or more" if long_enough else f"{minimum} or more, at run time",
        min_tokens=0 if long_enough else minimum,
    )


def min_tokens(policy: Policy, device: torch.device, precision: str, has_bias: bool = False) -> int:
    """The policy's minimum, or the device's measured break-even."""
    return break_even(device, precision, has_bias) if policy.min_tokens is None else policy.min_tokens


def _has_bias(claim: Claim) -> bool:
    return any(dynamo.example(mask.operand.node).dtype != torch.bool for mask in claim.masks)


def _kept_dense(claim: Claim, policy: Policy) -> str | None:
    """Why the profile keeps a site dense, or None."""
    if policy.profile is None:
        return None
    names = [name for name in (claim.site.name, claim.site.other_name) if name]
    return next(filter(None, map(policy.profile.dense_reason, names)), None)


@dataclass(frozen=True)
class Choice:
    """One entry for all heads or one per query head, the predictor they belong to, and who set them."""

    thresholds: tuple[Thresholds, ...]
    predictor: str
    source: str
    expected_density: float | None = None


def from_policy(policy: Policy, is_causal: bool) -> Choice:
    """The thresholds a policy names for all heads; what it leaves open is the rule's."""
    rule = rule_for(policy.predictor, is_causal)
    own = rule.thresholds
    entry = Thresholds(
        policy.topk,
        own.cdf if policy.cdf_threshold is None else policy.cdf_threshold,
        own.similarity if policy.similarity_threshold is None else policy.similarity_threshold,
        own.pv if policy.pv_threshold is None else policy.pv_threshold,
    )
    return Choice((entry,), rule.predictor, f"rule {rule.name}" if entry == own else "policy", policy.topk)


def _choose(claim: Claim, policy: Policy) -> Choice:
    profile, site = policy.profile, claim.site.name
    known = None if profile is None else profile.thresholds_of(site)
    if profile is not None and known is None and claim.site.other_name:
        site = claim.site.other_name
        known = profile.thresholds_of(site)
    if profile is None or known is None:
        return from_policy(policy, claim.is_causal)
    measured = [one.density for one in profile.measured.get(site, ())]
    expected = sum(measured) / len(measured) if measured else None
    return Choice(known, profile.predictor, "profile", expected)


def _reaches(q_len: Size, k_len: Size, minimum: int) -> bool | None:
    """Are both lengths at least `minimum`? None: the caller bounded a length, the operator decides at run time."""
    answers = [dynamo.guard(length >= minimum) for length in (q_len, k_len)]
    if False in answers:
        return False
    return None if None in answers else True


def _check_sizes(query: Operand, key: Operand, value: Operand, device: torch.device) -> Refusal | None:
    """Sizes the operator needs equal are equal, head dimensions are in range. Mostly known; else guarded on."""
    head_dim, value_dim = dynamo.specialize(query.shape[3]), dynamo.specialize(value.shape[3])
    if head_dim is None or value_dim is None:
        return Refusal("head_dim is not fixed")
    reason = ops.check_static(head_dim, value_dim, torch.float32, device)
    if reason is not None:
        return Refusal(reason)
    for what, left, right in (("query and key", query, key), ("query and value", query, value)):
        if dynamo.guard(left.shape[0] == right.shape[0]) is not True:  # the dense call would broadcast
            return Refusal(f"the batch sizes of {what} are not known to be equal ({left.shape[0]}, {right.shape[0]})")
    # Where the caller bounded these they cannot be guarded on; if they differ at run time, operator and dense call
    # raise alike.
    if dynamo.guard(key.shape[2] == value.shape[2]) is False:
        return Refusal(f"the numbers of keys and values differ ({key.shape[2]}, {value.shape[2]})")
    if dynamo.guard(query.shape[3] == key.shape[3]) is False:
        return Refusal(f"the head dimensions of query and key differ ({query.shape[3]}, {key.shape[3]})")
    return None


def _check_masks(claim: Claim) -> Refusal | None:
    """Each size of each mask is the call's or 1. Mostly known; else guarded on."""
    (batch, heads, q_len, _), k_len = claim.query.shape, claim.key.shape[2]
    for mask in claim.masks:
        for size, wanted in zip(mask.operand.shape, (batch, heads, q_len, k_len), strict=True):
            if not dynamo.known(size == 1) and dynamo.guard(size == wanted) is not True:
                shapes = f"{list(mask.operand.shape)}, wanted {[batch, heads, q_len, k_len]}"
                return Refusal(f"the sizes of attn_mask are not known to be the call's or 1 ({shapes})")
    return None
