"""Attention written out by hand: a product of queries and keys, a softmax, a product of weights and values.

What is read here is proven equal by numbers before it is rewritten (proof.py). What looks like attention and cannot be
read is reported with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import is_over_last_dimension, op_name, tensors_between, writers, writers_before
from sparge_compile.matchers import lookalikes
from sparge_compile.matchers.operand_sources import as_narrow, before_merge, before_widening, heads_of, taken_apart
from sparge_compile.matchers.products import Product, Unread, check_no_broadcast, is_product, read_product
from sparge_compile.matchers.score_path import (
    Scores,
    changes_in_place,
    first_scores,
    keeps_scores,
    product_letters,
)
from sparge_compile.operands import Dims, Operand
from sparge_compile.site import AttentionSite, Mask

NOT_ATTENTION = lookalikes.NOT_ATTENTION
_NOT_OVER_KEYS = "matmul, softmax, matmul with a softmax that is not over the last dimension: this is not attention"
_QUERIES, _KEYS = 2, 3
_LONGEST_PATH = 24
_MOST_TENSORS = 200
# What asks a tensor for its sizes or type only.
_ASKS = {"size", "dim", "numel", "stride", "is_contiguous", "full_like", "zeros_like", "ones_like", "empty_like"}
_ASKS |= {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "sym_size", "sym_numel", "sym_stride"}

# `graph.writers`
Writing = Mapping[int, list[fx.Node]]


def match(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every hand-written attention, read or with the reason it cannot be, and what does its work in other ways."""
    sites: list[AttentionSite] = []
    writing: Writing | None = None
    parameters = lookalikes.parameters(gm.graph)
    for node in gm.graph.nodes:
        reason = lookalikes.reason(node, parameters)
        if reason is not None:
            sites.append(AttentionSite(node, reason.pattern, unmatched=reason.text))
        elif lookalikes.is_softmax(node) and lookalikes.between_products(node, parameters):
            writing = writers(gm.graph) if writing is None else writing
            sites.append(_site(node, writing))
    return sites


def _site(node: fx.Node, writing: Writing) -> AttentionSite:
    if not is_over_last_dimension(node, node):
        return AttentionSite(node, NOT_ATTENTION, unmatched=_NOT_OVER_KEYS)
    try:
        return _read(node, writing)
    except Unread as unread:
        return AttentionSite(node, "softmax", unmatched=f"attention written out, and not read: {unread}")


@dataclass(frozen=True)
class _Second:
    """The second product: values and output, and the node that is the output."""

    value: Operand
    output: Operand


def _read(softmax: fx.Node, writing: Writing) -> AttentionSite:
    path = _path_to_product(_softmax_input(softmax))
    if path is None:
        raise Unread(
            "no product of queries and keys has the size of what the softmax gets (a sink beside the keys? a band?)"
        )
    product = read_product(path[0])
    scores = first_scores(product, path[0])
    understood = set(path)
    for consumer, source in zip([*path[1:], softmax], path, strict=True):
        for statement in _statements(source, consumer):
            scores.apply(statement, source)
            understood.add(statement)
        if consumer is not softmax:
            scores.apply(consumer, source)
    scores.converts_to(dynamo.example(softmax).dtype)
    query, key = _query_and_key(product)
    if scores.view.dims[_KEYS] != dynamo.example(softmax).dim() - 1:
        if scores.view.dims[_QUERIES] != dynamo.example(softmax).dim() - 1:
            raise Unread(_NOT_OVER_KEYS)
        # The product was of keys and queries, and transposed since.
        query, key = key, query
        scores.view = _transposed(scores.view)
        scores.masks = [replace(mask, operand=_transposed(mask.operand)) for mask in scores.masks]
    second = _second_product(softmax, replace(scores.view, node=softmax))
    written = {node for node in softmax.graph.nodes if dynamo.storage(node) in writing}
    site = _assemble(scores, dynamo.example(path[0]), query, key, second, written)
    _check_writes(site, understood, writing)
    return site


def _check_writes(site: AttentionSite, understood: set[fx.Node], writing: Writing) -> None:
    """What is made between the operands and the output must hold what its own call gave it.

    A write to an operand is none of this: `claim` knows whether one comes after a part of the call has read it.
    """
    operands = [site.query, site.key, site.value, *(mask.operand for mask in site.masks)]
    leaves = {operand.node for operand in operands if operand is not None}
    made = tensors_between([site.node], leaves, _MOST_TENSORS)
    others = writers_before(site.node, made, writing) - understood
    if others:
        raise Unread(f"{min(others)} may write in place to a tensor that the call makes")


def _softmax_input(softmax: fx.Node) -> fx.Node:
    given = softmax.args[0] if softmax.args else softmax.kwargs.get("input")
    result = dynamo.example(softmax)
    if not isinstance(given, fx.Node) or not isinstance(result, torch.Tensor):
        raise Unread("the softmax is called with arguments that are not understood")
    return given


def _path_to_product(node: fx.Node) -> list[fx.Node] | None:
    """The shortest way from a product to `node`: nodes, each an input of the next and as large."""
    paths, seen = [[node]], {node}
    for _ in range(_LONGEST_PATH):
        found = next((path for path in paths if is_product(path[0])), None)
        if found is not None:
            return found
        longer = []
        for path in paths:
            for source in path[0].all_input_nodes:
                if source not in seen and _is_as_large(source, path[0]):
                    seen.add(source)
                    longer.append([source, *path])
        paths = longer
    return None


def _is_as_large(source: fx.Node, node: fx.Node) -> bool:
    before, after = dynamo.example(source), dynamo.example(node)
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)) or before.dim() < 2:
        return False
    return before.dtype.is_floating_point and dynamo.known(before.numel() == after.numel())


def _statements(source: fx.Node, consumer: fx.Node) -> list[fx.Node]:
    """Writes in place on `source` as statements, before its only other user: `scores.div_(8)`."""
    users = [user for user in source.users if user is not consumer and not _only_asks(user, source)]
    for user in users:
        if not changes_in_place(user) or user.args[:1] != (source,) or user.users or not user < consumer:
            raise Unread("the scores are returned or used elsewhere")
    return sorted(users)


def _only_asks(user: fx.Node, node: fx.Node) -> bool:
    name = op_name(user)
    if name in ("type_as", "expand_as", "view_as", "reshape_as"):
        return user.args[:1] != (node,)
    return name in _ASKS or (name == "getattr" and user.args[1:] in (("shape",), ("dtype",), ("device",)))


def _query_and_key(product: Product) -> tuple[Operand, Operand]:
    summed, shared = product_letters(product)
    _check_sizes(product, shared)

    def operand(node: fx.Node, letters: str) -> Operand:
        (tokens,) = set(letters) - set(shared) - set(summed)
        return Operand(node, _places(letters, shared, tokens, summed))

    return operand(product.left, product.left_letters), operand(product.right, product.right_letters)


def _check_sizes(product: Product, shared: str) -> None:
    """One head for all queries may be broadcast, as GQA does; batches are checked with guards later."""
    if len(shared) == 1:
        check_no_broadcast(product, shared)


def _places(letters: str, shared: Sequence[str], third: str, last: str) -> Dims:
    batch, heads = (None,) * (2 - len(shared)) + tuple(letters.index(letter) for letter in shared)
    return batch, heads, letters.index(third), letters.index(last)


def _transposed(operand: Operand) -> Operand:
    first, second, third, last = operand.dims
    return replace(operand, dims=(first, second, last, third))


def _second_product(softmax: fx.Node, weights: Operand) -> _Second:
    node = softmax
    while True:
        users = [user for user in node.users if not _only_asks(user, node)]
        if len(users) != 1:
            raise Unread("the attention weights are returned or used elsewhere")
        if is_product(users[0]):
            return _values(read_product(users[0]), users[0], weights, node)
        try:
            weights = keeps_scores(users[0], node, weights)
        except Unread as unread:
            raise Unread(str(unread).replace("the scores", "the attention weights")) from None
        node = users[0]


def _values(product: Product, node: fx.Node, weights: Operand, source: fx.Node) -> _Second:
    """The other side of the second product is the values, if it sums over the keys."""
    if (product.left is source) == (product.right is source) or product.added is not None or product.scale != 1:
        raise Unread("the second product is not of attention weights and values")
    left = product.left is source
    letters, others = product.left_letters, product.right_letters
    value, (letters, others) = (product.right, (letters, others)) if left else (product.left, (others, letters))
    summed, shared = product_letters(product)
    names = [None if dim is None else letters[dim] for dim in weights.dims]
    own = [letter for letter in others if letter not in letters]
    queries = names[_QUERIES]
    if names[_KEYS] != summed or queries is None or queries in others or len(own) != 1:
        raise Unread("the second product does not sum the attention weights over the keys")
    if set(shared) != {letter for letter in names[:2] if letter is not None}:
        raise Unread("the second product has other dimensions for batch and heads than the first")
    _check_sizes(product, shared)
    places = [None if name is None else others.index(name) for name in (*names[:2], summed, own[0])]
    outputs = [None if name is None else product.letters.index(name) for name in (*names[:3], own[0])]
    return _Second(
        Operand(value, (places[0], places[1], places[2], places[3]), weights.heads),
        Operand(node, (outputs[0], outputs[1], outputs[2], outputs[3]), weights.heads),
    )


def _assemble(
    scores: Scores, product: torch.Tensor, query: Operand, key: Operand, second: _Second, written: set[fx.Node]
) -> AttentionSite:
    result = dynamo.example(second.output.node)
    operands = [query, key, second.value, second.output, *(mask.operand for mask in scores.masks)]
    scores.check_types(dynamo.hint(query.shape[3]), result.dtype)
    heads = scores.heads or second.output.heads or heads_of(query)
    if heads is not None:
        operands = [before_merge(taken_apart(operand, heads, query), written) for operand in operands]
    elif query.dims[0] is None:
        # A batch may be of any size, a number of heads is guarded on.
        operands = [replace(x, dims=(x.dims[1], x.dims[0], x.dims[2], x.dims[3])) for x in operands]
    query, key, value, output, *masked = operands
    query = as_narrow("query", query, product.dtype, result.dtype, written)
    key = as_narrow("key", key, product.dtype, result.dtype, written)
    masks = tuple(
        Mask(before_widening(operand, result.dtype, written), mask.hides)
        for mask, operand in zip(scores.masks, masked, strict=True)
    )
    return AttentionSite(
        output.node,
        "softmax",
        query=query,
        key=key,
        value=value,
        output=output,
        masks=masks,
        scale=scores.scale,
        enable_gqa=True,  # a product broadcasts one head over all of them
        several_nodes=True,
        empty_rows=_empty_rows(scores),
    )


def _empty_rows(scores: Scores) -> Literal["nan", "mean"]:
    if scores.fill is None or scores.fill == -math.inf:
        return "nan"
    if not all(dynamo.example(mask.operand.node).dtype == torch.bool for mask in scores.masks):
        raise Unread(f"scores are filled with {scores.fill} and added to: rows with nothing open could mean anything")
    return "mean"
