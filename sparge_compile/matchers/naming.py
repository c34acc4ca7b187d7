"""Site names and source locations from what TorchDynamo recorded on a node."""

from __future__ import annotations

import re

from torch import fx

from sparge_compile import dynamo

_ROOT = re.compile(r"""^(?:[LG]\[(['"]).+?\1\]|\w+)""")
_SUBSCRIPT = re.compile(r"""\[(['"]?)(.+?)\1\]""")


def module_name(node: fx.Node, prefix: str = "") -> str:
    """The qualified name of the module a node belongs to, or the function's name outside any module.

    Args:
        node: a node of a TorchDynamo graph.
        prefix: the qualified name of the module whose forward the graph was traced from, if it is not the whole
            model. That module itself is called by its class where it has no name.
    """
    found = dynamo.module_path(node)
    if found is not None:
        path, class_name = found
        return ".".join(part for part in (prefix, qualified(path)) if part) or class_name
    root, frame = dynamo.root_module(), dynamo.user_frame(node)
    if root is not None:
        return prefix or type(root).__name__
    return frame[2] if frame else "attention"


def qualified(path: str) -> str:
    """TorchDynamo's path of a module (`L['self'].blocks.slice(...)[3]`) as PyTorch writes qualified names.

    >>> qualified("L['self']._modules['blocks']._modules['3'].attn1")
    'blocks.3.attn1'
    """
    path = _ROOT.sub("", path, count=1)
    path = _SUBSCRIPT.sub(r".\2", path)
    parts = [part for part in path.split(".") if part and part not in ("_modules", "_orig_mod")]
    return ".".join(parts)


def source_location(node: fx.Node) -> str:
    """`file:line` of the call in user code, or an empty string."""
    frame = dynamo.user_frame(node)
    return f"{frame[0]}:{frame[1]}" if frame else ""
