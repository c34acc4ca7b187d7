"""What happens to the scores between the first product and the softmax, read step by step.

The scores are followed as an `Operand` (which dimension is batch, heads, queries, keys). Every step either changes that
view, the scale, or the masks; one that is not known to do exactly this ends the reading with `Unread`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import CONVERTS, op_name
from sparge_compile.matchers.constants import constant, factor, number, rounded
from sparge_compile.matchers.products import Product, Unread, is_float
from sparge_compile.matchers.views import viewed
from sparge_compile.operands import Operand, keeps_digits
from sparge_compile.site import Mask

# A finite number this low leaves a position no weight beside any ordinary score, and a lower one beside large scores.
_HIDES, _HIDES_ANYWAY = -1e4, -1e8
_ORDINARY = 100.0  # scale * sqrt(head_dim): the spread of the scores of normal numbers
# Converting scores to these changes no more than their rounding; an eight-bit type would.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAME = {"contiguous", "clone", "detach", "identity"}
_VIEWS = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "_unsafe_view",
    "transpose",
    "permute",
    "t",
}
_VIEWS |= {"swapaxes", "swapdims", "getattr", "mT"}
_IN_PLACE = {"add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div", "masked_fill_": "masked_fill"}
_IN_PLACE |= {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}
_SYNONYMS = {"truediv": "div", "divide": "div", "true_divide": "div", "multiply": "mul", "subtract": "sub"}
_CAPS = {"tanh": "softcap (tanh) on the scores"}


@dataclass
class Scores:
    """The scores as far as they have been followed.

    Attributes:
        view: the tensor that holds them; batch, heads, queries, keys.
        scale: what the product has been multiplied by.
        masks: added to the scores or hiding them.
        fill: what hidden positions were filled with, None before any were.
        heads: how many there are, where the product has batch and heads in one dimension and a view takes them apart.
        dtype: of the last step.
        added_in: the types in which masks of floats were added.
        narrowed: they have been converted to fp16, where what is large is infinite.
    """

    view: Operand
    dtype: torch.dtype
    scale: Any = 1.0
    masks: list[Mask] = field(default_factory=list)
    fill: float | None = None
    heads: int | None = None
    added_in: list[torch.dtype] = field(default_factory=list)
    narrowed: bool = False

    def apply(self, node: fx.Node, source: fx.Node) -> None:
        """One step: `node` makes new scores out of `source`, or changes them in place."""
        name = canonical(node)
        if name in _STEPS:
            _STEPS[name](self, node, source)
            self.converts_to(dynamo.example(node).dtype)
        else:
            self.view, before = keeps_scores(node, source, self.view), self.view
            self.converts_to(dynamo.example(node).dtype)
            if before.dims[0] is None and before.heads is None and not dynamo.known(self.view.shape[0] == 1):
                self.heads = dynamo.specialize(self.view.shape[1])

    def add(self, added: Any, dtype: torch.dtype) -> None:
        """Adds a mask of floats, of any shape that the scores' contains, with a sum of this type."""
        if not is_float(added):
            raise Unread("what is added to the scores is not a tensor of floats")
        self.masks.append(Mask(self._aligned(added)))
        self.added_in.append(dtype)

    def hide(self, condition: Any, fill: Any, dtype: torch.dtype, *, hides: bool) -> None:
        """Fills positions of scores of this type with a number; `hides`: where the condition is true."""
        value = constant(fill)
        if value is None:
            raise Unread("masked scores are filled with what is not a constant number")
        value = rounded(value, dtype)
        if not value <= _HIDES:
            raise Unread(f"masked scores are filled with {value}, which may leave them weight")
        if self.fill is not None and self.fill != value:
            raise Unread(f"scores are filled with two numbers, {self.fill} and {value}")
        boolean = dynamo.example(condition) if isinstance(condition, fx.Node) else None
        if not isinstance(boolean, torch.Tensor) or boolean.dtype != torch.bool:
            raise Unread("the condition under which scores are masked is not a boolean tensor")
        self.masks.append(Mask(self._aligned(condition), hides))
        self.fill = value

    def converts_to(self, dtype: torch.dtype) -> None:
        """What positions were filled with, and what was added to them, may become infinite in a narrower type."""
        if self.narrowed and dtype != torch.float16:
            raise Unread(f"the scores are converted to fp16, where large ones are infinite, and back to {dtype}")
        self.narrowed = self.narrowed or (dtype == torch.float16 and self.dtype != torch.float16)
        self.dtype = dtype
        if self.fill is not None:
            self.fill = rounded(self.fill, dtype)
        added = [dynamo.example(m.operand.node).dtype for m in self.masks]
        if any(one.is_floating_point and not keeps_digits(one, dtype) for one in added):
            raise Unread(f"the scores are converted to {dtype} after a mask of {added[0]} was added")

    def multiply(self, by: Any) -> None:
        """Multiplies by a constant. Masks that were added would be multiplied, too."""
        if by is None:
            raise Unread("the scale is not a constant number (a tensor, or a value that changes from call to call)")
        if self.masks:
            raise Unread("the scores are scaled after they were masked")
        self.scale = self.scale * by

    def check_types(self, head_dim: int | None, output: torch.dtype) -> None:
        """The operator sums masks in the output's type, and takes a fill for a position that is closed.

        Raises:
            Unread: the sum would be another, or a large score might leave filled positions weight.
        """
        wider = [dtype for dtype in self.added_in if not keeps_digits(dtype, output)]
        if wider and len(self.added_in) > 1:
            raise Unread(f"several masks are added to the scores in {wider[0]}, and the output is {output}")
        scale = dynamo.specialize(self.scale)
        if self.fill is None or self.fill <= _HIDES_ANYWAY or scale is None or head_dim is None:
            return
        if abs(scale) * math.sqrt(head_dim) > _ORDINARY:
            raise Unread(f"masked scores are filled with {self.fill}, which may leave them weight with scale {scale}")

    def _aligned(self, node: fx.Node) -> Operand:
        """A tensor beside the scores, as broadcasting sees it."""
        sizes = dynamo.example(self.view.node).shape
        missing = len(sizes) - dynamo.example(node).dim()
        if missing < 0:
            raise Unread("a mask has more dimensions than the scores")
        first, second, third, last = (None if d is None or d < missing else d - missing for d in self.view.dims)
        merged = second is not None and not dynamo.known(dynamo.example(node).shape[second] == 1)
        return Operand(node, (first, second, third, last), self.view.heads if merged else None)


def canonical(node: fx.Node) -> str:
    """`mul` for mul_, imul, multiply and __mul__ alike."""
    name = _IN_PLACE.get(op_name(node), op_name(node))
    name = name.strip("_") if name.startswith("__") else name
    return _SYNONYMS.get(name, name)


def changes_in_place(node: fx.Node) -> bool:
    """Is this one of the writes in place that are understood?"""
    return op_name(node) in _IN_PLACE


def keeps_scores(node: fx.Node, source: fx.Node, view: Operand) -> Operand:
    """The view of scores, or of weights, after a step that changes no number: a cast, a view, inactive dropout.

    Raises:
        Unread: it is another kind of step.
    """
    name, before, after = canonical(node), dynamo.example(source), dynamo.example(node)
    if not node.args or node.args[0] is not source or not isinstance(after, torch.Tensor):
        raise Unread(f"the scores go through {name or node.target}, which is not understood")
    if name in _VIEWS and after.dtype == before.dtype:
        return viewed(view, node)
    if name in ("dropout", "feature_dropout") and not _drops(node):
        return replace(view, node=node)
    converts = name in CONVERTS and after.dtype in _FLOATS and after.device == before.device
    if converts or name in _SAME:
        return replace(view, node=node)
    raise Unread(f"{_CAPS[name]}" if name in _CAPS else f"the scores go through {name or node.target}")


def _drops(node: fx.Node) -> bool:
    names = ("input", "p", "train" if isinstance(node.target, dynamo.Operator) else "training", "inplace")
    given: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
    given.update(zip(names, node.args, strict=False))
    given.update(node.kwargs)
    training = given.get("train", given["training"])
    if training is False or number(given["p"]) == 0:
        return given["inplace"] is not False
    raise Unread("dropout is active between the products; call model.eval() or set it to 0")


def first_scores(product: Product, node: fx.Node) -> Scores:
    """The scores as the first product gives them: its rows are queries, its columns keys."""
    summed, shared = product_letters(product)
    rows = [x for x in product.left_letters if x not in shared + summed]
    columns = [x for x in product.right_letters if x not in shared + summed]
    if len(rows) != 1 or len(columns) != 1 or len(shared) > 2:
        raise Unread("the product of queries and keys has more than batch, heads and one dimension of each")
    places = (*[None] * (2 - len(shared)), *[product.letters.index(x) for x in (*shared, rows[0], columns[0])])
    first, second, third, last = places
    scores = Scores(Operand(node, (first, second, third, last)), dynamo.example(node).dtype)
    scores.multiply(product.scale)
    if product.added is not None:
        scores.add(product.added, scores.dtype)
    return scores


def product_letters(product: Product) -> tuple[str, str]:
    """(the one summed over, those of batch and heads in the output's order)."""
    both = set(product.left_letters) & set(product.right_letters)
    summed = "".join(both - set(product.letters))
    return summed, "".join(x for x in product.letters if x in both)


def _multiply(scores: Scores, node: fx.Node, source: fx.Node) -> None:
    scores.multiply(factor(_other(node, source)))
    _moves_on(scores, node)


def _divide(scores: Scores, node: fx.Node, source: fx.Node) -> None:
    divisor = factor(_other(node, source))
    if node.args[0] is not source or (isinstance(divisor, float) and divisor == 0):
        raise Unread("the scores are a divisor, or divided by zero")
    scores.multiply(None if divisor is None else 1 / divisor)
    _moves_on(scores, node)


def _add(scores: Scores, node: fx.Node, source: fx.Node) -> None:
    scores.add(_other(node, source), dynamo.example(node).dtype)
    _moves_on(scores, node)


def _subtract(scores: Scores, node: fx.Node, source: fx.Node) -> None:
    raise Unread("something is subtracted from the scores; only what is added to them is read as a mask")


def _fill(scores: Scores, node: fx.Node, source: fx.Node) -> None:
    given = _bound(node, ("self", "mask", "value"))
    if given["self"] is not source:
        raise Unread("masked_fill is not of the scores")
    scores.hide(given["mask"], given["value"], dynamo.example(node).dtype, hides=True)
    _moves_on(scores, node)


def _where(scores: Scores, node: fx.Node, source: fx.Node) -> None:
    method = node.op == "call_method"
    given = _bound(node, ("input", "condition", "other") if method else ("condition", "input", "other"))
    yes, no = given["input"], given["other"]
    if (yes is source) == (no is source):
        raise Unread("where() does not choose between the scores and a number")
    fill = no if yes is source else yes
    scores.hide(given["condition"], fill, dynamo.example(node).dtype, hides=yes is not source)
    _moves_on(scores, node)


def _moves_on(scores: Scores, node: fx.Node) -> None:
    """The step's result holds the scores now, unless it broadcast them or was a statement that wrote in place."""
    before, after = dynamo.example(scores.view.node), dynamo.example(node)
    same = len(before.shape) == len(after.shape)
    if not same or not all(dynamo.known(a == b) for a, b in zip(before.shape, after.shape, strict=True)):
        raise Unread(f"the scores are broadcast by {op_name(node)}")
    if not after.dtype.is_floating_point:
        raise Unread("the scores are not floating-point numbers")
    scores.view = replace(scores.view, node=node)


def _other(node: fx.Node, source: fx.Node) -> Any:
    """The operand of a sum or product that is not the scores."""
    if node.kwargs or len(node.args) != 2 or (node.args[0] is source) == (node.args[1] is source):
        raise Unread(f"{op_name(node)} is called with arguments that are not understood")
    return node.args[1] if node.args[0] is source else node.args[0]


def _bound(node: fx.Node, names: tuple[str, str, str]) -> dict[str, Any]:
    given = dict(zip(names, node.args, strict=False))
    named = {"self" if key == "input" and "self" in names else key: value for key, value in node.kwargs.items()}
    if len(node.args) > 3 or set(given) & set(named) or {*given, *named} != set(names):
        raise Unread(f"{op_name(node)} is called with arguments that are not understood")
    return {**given, **named}


_STEPS: dict[str, Callable[[Scores, fx.Node, fx.Node], None]] = {
    "mul": _multiply,
    "div": _divide,
    "add": _add,
    "sub": _subtract,
    "masked_fill": _fill,
    "where": _where,
}
