"""Proving that what replaces an attention call of several nodes computes the same: both on random numbers.

The nodes of the call run in double precision on the CPU, with few tokens, and so does the rewritten form with a dense
attention in the operator's place. That the operator itself is right is its own tests' to show.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sparge_compile import dynamo
from sparge_compile.graph import CONVERTS, op_name, tensors_between, writers, writers_before
from sparge_compile.operands import Operand
from sparge_compile.proof_key import proof_key
from sparge_compile.rewrite import attend
from sparge_compile.site import Claim, Decision, Refusal
from sparge_kernels.mask_inputs import attending, fill_empty_rows

_MOST_NODES = 200
_MOST_ELEMENTS = 2**22
_FEW = (5, 7, 9, 11, 13, 17, 19, 23, 29, 31)
_LONG = 16
# The operations that take sizes of tensors, by the position from which on.
_TAKES_SIZES = {"arange": 0, "ones": 0, "zeros": 0, "empty": 0, "full": 0, "expand": 1, "view": 1, "reshape": 1}
_TAKES_SIZES |= {"_unsafe_view": 1, "unflatten": 1, "getitem": 1, "narrow": 1, "new_ones": 1, "new_zeros": 1}
_TAKES_SIZES |= {"new_full": 1, "broadcast_to": 1, "repeat": 1}
_SAME = {"rtol": 1e-6, "atol": 1e-6}


def prove(decision: Decision, known: dict[Hashable, str | None]) -> Refusal | None:
    """None if the rewritten form of a decided site computes what its nodes compute, else the reason it stays dense.

    Args:
        decision: for a site of several nodes.
        known: what has been found out in this compile, which is added to.
    """
    try:
        with dynamo.real_tensors(), torch.no_grad():
            difference = _difference(decision, known)
    except Exception as error:  # the nodes are the user's: whatever they raise, they are not proven
        difference = f"checking failed with {type(error).__name__}: {error}"
    return None if difference is None else Refusal(f"attention written out, and not proven equal: {difference}")


def _difference(decision: Decision, known: dict[Hashable, str | None]) -> str | None:
    claim = decision.claim
    leaves = [operand.node for operand in _inputs(claim)]
    piece = _piece(claim, leaves, writers(claim.output.node.graph))
    small = _Sizes(claim)
    key = proof_key(claim, piece, leaves, small.each)
    if key is None:
        return _difference_of(decision, piece, small)
    if key not in known:
        known[key] = _difference_of(decision, piece, small)
    return known[key]


def _difference_of(decision: Decision, piece: Sequence[fx.Node], small: _Sizes) -> str | None:
    claim = decision.claim
    for rows in ("open", "closed") if claim.masks else ("open",):
        values = _random(claim, small, rows)
        expected = _run(piece, claim.output.node, values, small)
        actual = _rewritten(decision, values)
        difference = _compare(actual, expected)
        if difference is not None:
            return difference
    return None


def _inputs(claim: Claim) -> tuple[Operand, ...]:
    return (claim.query, claim.key, claim.value, *(mask.operand for mask in claim.masks))


def _piece(claim: Claim, leaves: Collection[fx.Node], writing: Mapping[int, list[fx.Node]]) -> list[fx.Node]:
    """The nodes of the call in their order: what the output is made of, and what writes into that."""
    output = claim.output.node
    found = tensors_between([output], leaves, _MOST_NODES)
    while missing := writers_before(output, found, writing) - found:
        found |= tensors_between(missing, leaves, _MOST_NODES)
        if not missing <= found:
            raise ValueError(f"{min(missing - found)} may write in place to what it depends on")
    for node in sorted(found):
        if node.op not in ("call_function", "call_method") or len(found) > _MOST_NODES:
            raise ValueError(f"it depends on {node}")
    return sorted(found)


class _Sizes:
    """Few tokens in place of many: a small number for each symbolic size and each long static one."""

    def __init__(self, claim: Claim) -> None:
        self._symbols: dict[Any, int] = {}
        (batch, heads, q_len, head_dim), (_, kv_heads, k_len, _) = claim.query.shape, claim.key.shape
        kept = {n for n in (heads, kv_heads, head_dim, claim.value.shape[3]) if isinstance(n, int)}
        shrinks = isinstance(batch, int) and isinstance(heads, int) and batch > _LONG
        shrinks = shrinks and batch not in kept and batch * heads not in kept | {q_len, k_len}
        kept |= {batch} if isinstance(batch, int) and not shrinks else set()
        few = iter(number for number in _FEW if number not in kept)
        self._static: dict[Any, Any] = {
            n: next(few) for n in (q_len, k_len) if isinstance(n, int) and n > _LONG and n not in kept
        }
        self._fresh = few
        if shrinks:
            self._static = {batch: min({2, 3, 4, 6} - kept), **self._static}
            self._static[batch * heads] = self._static[batch] * heads

    def of(self, value: Any) -> Any:
        """A size, symbolic or not, or another number."""
        if isinstance(value, torch.SymFloat):
            return dynamo.specialize(value)  # the reading took it for the number it is now, too
        if isinstance(value, (torch.SymInt, torch.SymBool)):
            for symbol, at_hand in sorted(dynamo.symbols(value).items(), key=str):
                if symbol not in self._symbols:
                    keeps = at_hand is not None and at_hand <= _LONG  # a number of heads must stay what it is
                    self._symbols[symbol] = at_hand if keeps and at_hand is not None else next(self._fresh)
            return dynamo.evaluated(value, self._symbols)
        return self._static.get(value, value) if type(value) is int else value

    def each(self, argument: Any) -> Any:
        """The sizes in an argument of an operation, slices included."""
        if isinstance(argument, slice):
            return slice(*(self.of(bound) for bound in (argument.start, argument.stop, argument.step)))
        if isinstance(argument, (tuple, list)):
            return type(argument)(self.each(one) for one in argument)
        return self.of(argument)


def _random(claim: Claim, small: _Sizes, rows: str) -> dict[fx.Node, Tensor]:
    """Numbers for what the call reads; `closed` rows: the first of each mask hides everything."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def shape(node: fx.Node) -> list[int]:
        sizes = [small.of(size) for size in dynamo.example(node).shape]
        if math.prod(sizes) > _MOST_ELEMENTS:
            raise ValueError(f"it would take a tensor of {sizes}")
        return sizes

    def normal(node: fx.Node) -> Tensor:
        return torch.randn(shape(node), generator=generator, dtype=torch.float64, device="cpu")

    values = {operand.node: normal(operand.node) for operand in (claim.query, claim.key, claim.value)}
    # Scores around 1, so that a difference in any of them shows.
    spread = abs(claim.scale or 1.0) * math.sqrt(dynamo.hint(claim.query.shape[3]) or 1)
    values[claim.query.node] = values[claim.query.node] / spread
    for mask in claim.masks:
        node = mask.operand.node
        hidden = torch.rand(shape(node), generator=generator, dtype=torch.float64, device="cpu") < 0.4
        keys = mask.operand.dims[3]
        if keys is not None:
            first = hidden.movedim(keys, -1).reshape(-1, hidden.shape[keys])[:1]
            hidden.movedim(keys, -1)[(0,) * (hidden.dim() - 1)] = torch.full_like(first[0], rows == "closed")
        if dynamo.example(node).dtype == torch.bool:
            values[node] = hidden == mask.hides
        else:
            values[node] = normal(node).masked_fill(hidden, -math.inf)
    scores = math.prod(small.of(size) for size in (*claim.query.shape[:3], claim.key.shape[2]))
    if scores > _MOST_ELEMENTS:
        raise ValueError(f"it would take {scores} scores")
    return values


def _run(piece: Iterable[fx.Node], output: fx.Node, inputs: dict[fx.Node, Tensor], small: _Sizes) -> Tensor:
    """What the nodes compute, in double precision."""
    values = {node: value.clone() for node, value in inputs.items()}
    for node in piece:
        result = _step(node, values, small)
        values[node] = _wide(result, dynamo.example(node).dtype) if result.is_floating_point() else result
    return values[output]


def _wide(result: Tensor, dtype: torch.dtype) -> Tensor:
    """In double precision, but infinite where the type that the nodes compute in is. In place: views see it, too."""
    result = result.double()
    largest = torch.finfo(dtype).max
    if not result.numel() or all(abs(bound) <= largest for bound in torch.aminmax(result)):
        return result
    too_large = (result.abs() > largest) & result.isfinite()
    return result.copy_(torch.where(too_large, result * math.inf, result)) if too_large.any() else result


def _step(node: fx.Node, values: dict[fx.Node, Tensor], small: _Sizes) -> Tensor:
    example, name = dynamo.example(node), op_name(node)
    if name in CONVERTS:
        source = values[node.all_input_nodes[0]]
        dtype = torch.float64 if example.dtype.is_floating_point else example.dtype
        return source.to(dtype, copy=dynamo.storage(node) != dynamo.storage(node.all_input_nodes[0]))

    def known(argument: fx.Node) -> Any:
        found = dynamo.example(argument)
        return values[argument] if isinstance(found, Tensor) else small.each(found)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
    start = _TAKES_SIZES.get(name)
    if start is not None:
        args = (*args[:start], *(small.each(argument) for argument in args[start:]))
        kwargs = {key: small.each(argument) for key, argument in kwargs.items()}
    # A constant keeps the digits it has; everything else is double.
    args, kwargs = fx.node.map_aggregate((args, kwargs), _on_cpu if example.dim() == 0 else _double_on_cpu)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _on_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _double_on_cpu(argument: Any) -> Any:
    is_float = isinstance(argument, torch.dtype) and argument.is_floating_point
    return torch.float64 if is_float else _on_cpu(argument)


def _rewritten(decision: Decision, inputs: dict[fx.Node, Tensor]) -> Tensor:
    """What the nodes of the rewritten form compute: `attend` computes its examples, which are real tensors here."""
    graph = fx.Graph()
    stand_ins: dict[fx.Node, fx.Node] = {}
    for node, value in inputs.items():
        stand_ins[node] = graph.placeholder(node.name)
        dynamo.set_example(stand_ins[node], value)
    claim = replace(decision.claim, dtype=torch.float64)
    output = attend(graph, replace(decision, claim=claim, table=None), stand_ins.__getitem__, dense_attention)
    return dynamo.example(output)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool,
    scale: float,
    layout: Sequence[int],
    mask_hides: bool = False,
    empty_rows: str = "zero",
    **_: Any,
) -> Tensor:
    """What `sparge::attention` computes if it skips and rounds nothing."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool, device="cpu").triu(1), -math.inf)
    if attn_mask is not None:
        attn_mask = attending(attn_mask, mask_hides)
        closed = ~attn_mask if attn_mask.dtype == torch.bool else None
        scores = scores + attn_mask if closed is None else scores.masked_fill(closed, -math.inf)
    weights = scores.softmax(-1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    output = weights @ value
    if attn_mask is not None:
        fill_empty_rows(output, value, attn_mask, empty_rows)
    return torch.empty_permuted(output.shape, tuple(layout), dtype=output.dtype, device="cpu").copy_(output)


def _compare(actual: Tensor, expected: Tensor) -> str | None:
    if actual.shape != expected.shape:
        return f"the shape is {list(actual.shape)} instead of {list(expected.shape)}"
    strides = [_strides(tensor) for tensor in (actual, expected)]
    if strides[0] != strides[1]:
        return f"the strides are {strides[0]} instead of {strides[1]}"
    if torch.allclose(actual, expected, **_SAME, equal_nan=True):
        return None
    largest = (actual - expected).abs().nan_to_num(math.inf).max().item()
    return f"the numbers differ by up to {largest:.3g}"


def _strides(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
