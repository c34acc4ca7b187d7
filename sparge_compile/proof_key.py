"""What a check by numbers depends on, as a key: calls of equal layers are checked once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparge_compile import dynamo
from sparge_compile.operands import Operand
from sparge_compile.site import Claim

# Arguments that their text tells apart. What else there is makes a check that is not remembered.
_PLAIN = {type(None), bool, int, float, complex, str, type(Ellipsis)}
_PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}


def proof_key(
    claim: Claim, piece: Sequence[fx.Node], leaves: Iterable[fx.Node], resized: Callable[[Any], Any]
) -> Hashable | None:
    """Equal for two calls that are the same but for the names of their nodes; None for one that has no key.

    Args:
        claim: what is checked.
        piece: the nodes that are run, in their order.
        leaves: the tensors that they read, in the order of their roles.
        resized: the number that is run in place of one that may be symbolic, or of each in a tuple.
    """
    numbers: dict[fx.Node, int] = {}
    for node in (*dict.fromkeys(leaves), *piece):
        numbers[node] = len(numbers)
    first: dict[int | None, int] = {}
    for node, number in numbers.items():
        first.setdefault(dynamo.storage(node), number)

    def text(argument: Any) -> str:
        if isinstance(argument, fx.Node):
            found = dynamo.example(argument)
            return f"%{numbers[argument]}" if isinstance(found, Tensor) else text(resized(found))
        if isinstance(argument, (tuple, list)):
            return f"{type(argument).__name__}({', '.join(text(one) for one in argument)})"
        if isinstance(argument, dict):
            return f"dict({', '.join(f'{key!r}: {text(one)}' for key, one in argument.items())})"
        if isinstance(argument, slice):
            return f"slice({text(argument.start)}, {text(argument.stop)}, {text(argument.step)})"
        if type(argument) not in _PLAIN:
            raise TypeError(argument)
        return repr(argument)

    def operand(one: Operand) -> tuple[Hashable, ...]:
        return numbers[one.node], one.dims, one.heads

    def tensor(node: fx.Node) -> tuple[Hashable, ...]:
        example = dynamo.example(node)
        shape, small = tuple(example.shape), [resized(size) for size in example.shape]
        # Which nodes share memory decides what a write reaches, and the layout of the output what is compared.
        memory = first.get(dynamo.storage(node))
        return str(shape), text(small), str(example.dtype), dynamo.physical_layout(example), memory

    try:
        calls = tuple((node.op, node.target, text(node.args), text(node.kwargs)) for node in piece)
        tensors = tuple(tensor(node) for node in numbers)
    except (KeyError, TypeError):
        return None
    masks = tuple((operand(mask.operand), mask.hides) for mask in claim.masks)
    operands = tuple(operand(one) for one in (claim.query, claim.key, claim.value, claim.output))
    numbers_of = (claim.is_causal, repr(claim.scale), claim.enable_gqa, claim.dtype, claim.site.empty_rows)
    return calls, tensors, operands, masks, numbers_of
