"""Matrix products in every spelling, their dimensions named by letters as einsum names them."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import op_name
from sparge_compile.matchers.constants import number

_MATMULS = ("matmul", "__matmul__", "bmm", "mm")
_NAMES = (*_MATMULS, "__rmatmul__", "baddbmm", "einsum")


class Unread(Exception):
    """The call cannot be read as attention; the message says why."""


@dataclass(frozen=True)
class Product:
    """`output = scale * left @ right + beta * added`; letters name the dimensions, equal ones are the same."""

    left: fx.Node
    right: fx.Node
    left_letters: str
    right_letters: str
    letters: str
    scale: float = 1.0
    added: fx.Node | None = None


def is_product(node: fx.Node) -> bool:
    """Is this node a matrix product, in function, method or operator form?"""
    return op_name(node) in _NAMES


def read_product(node: fx.Node) -> Product:
    """A product of two tensors.

    Raises:
        Unread: it sums, repeats or broadcasts dimensions, or is called in a way that is not known.
    """
    name = op_name(node)
    if name == "einsum":
        return _einsum(node)
    if name == "baddbmm":
        return _baddbmm(node)
    operands = [*node.args, *(node.kwargs[key] for key in ("other", "mat2", "tensor2") if key in node.kwargs)]
    if len(operands) != 2 or len(operands) != len(node.args) + len(node.kwargs):
        raise Unread(f"{name} is called with arguments that are not understood")
    left, right = reversed(operands) if name == "__rmatmul__" else operands
    return _matmul(left, right)


def _matmul(left: Any, right: Any, scale: float = 1.0, added: fx.Node | None = None) -> Product:
    ranks = [dynamo.example(x).dim() for x in (left, right) if isinstance(x, fx.Node)]
    if len(ranks) != 2 or ranks[0] != ranks[1]:
        raise Unread(f"the product broadcasts tensors of {ranks} dimensions")
    if not 2 <= ranks[0] <= 4:
        raise Unread(f"the product has {ranks[0]} dimensions; 2 to 4 are supported")
    shared = "ab"[: ranks[0] - 2]
    return Product(left, right, shared + "ij", shared + "jk", shared + "ik", scale, added)


def _baddbmm(node: fx.Node) -> Product:
    names = ("input", "batch1", "batch2", "beta", "alpha")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False))
    if len(node.args) > 3 or not set(node.kwargs) <= set(names) - set(given):
        raise Unread("baddbmm is called with arguments that are not understood")
    given.update(node.kwargs)
    beta, alpha = number(given.get("beta", 1)), number(given.get("alpha", 1))
    if beta not in (0, 1) or alpha is None:
        raise Unread(f"baddbmm with beta={beta} and alpha={alpha} is not a mask added to scaled scores")
    return _matmul(given["batch1"], given["batch2"], float(alpha), given["input"] if beta else None)


def _einsum(node: fx.Node) -> Product:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or node.kwargs:
        raise Unread("einsum is not of two tensors and a constant equation")
    left, right = operands
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        raise Unread("einsum is not of two tensors of the graph")
    terms = _terms(equation, [dynamo.example(x).dim() for x in (left, right)])
    if any(len(set(term)) != len(term) for term in terms) or not 2 <= len(terms[2]) <= 4:
        raise Unread(f"einsum {equation!r} is not understood")
    return Product(left, right, *terms)


def _terms(equation: str, ranks: list[int]) -> tuple[str, str, str]:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        raise Unread(f"einsum {equation!r} is not understood")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    covered = {rank - len(term) + 3 for rank, term in zip(ranks, terms, strict=True) if "..." in term}
    if len(covered) > 1 or ("..." in output and not covered) or (covered and not all("..." in t for t in terms)):
        raise Unread(f"einsum {equation!r} broadcasts")
    shared = "".join(unused[: max(covered, default=0)])
    left, right, out = (term.replace("...", shared) for term in (*terms, output))
    known = set(left) | set(right)
    if not (left + right + out).isalpha() or not set(out) <= known or [len(left), len(right)] != ranks:
        raise Unread(f"einsum {equation!r} is not understood")
    summed = known - set(out)
    if len(summed) != 1 or not summed <= set(left) & set(right):
        raise Unread(f"einsum {equation!r} does not sum over one dimension of both tensors")
    return left, right, out


def check_no_broadcast(product: Product, letters: str) -> None:
    """Raises `Unread` if the tensors differ in the size of one of these dimensions."""
    left, right = dynamo.example(product.left).shape, dynamo.example(product.right).shape
    for letter in letters:
        sizes = left[product.left_letters.index(letter)], right[product.right_letters.index(letter)]
        if not dynamo.known(sizes[0] == sizes[1]):
            raise Unread(f"the product broadcasts ({sizes[0]} over {sizes[1]})")


def is_float(node: Any) -> bool:
    """Is this a floating-point tensor of the graph?"""
    value = dynamo.example(node) if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
