"""Site names and source locations from what TorchDynamo recorded on a node."""

from __future__ import annotations

import re

import torch
from torch import fx, nn

from sparge_compile import dynamo

_ROOT = re.compile(r"""^(?:[LG]\[(['"]).+?\1\]|\w+)""")
# What TorchDynamo and torch.compile put into a path that is no part of a qualified name.
_PLUMBING = ("_modules", "__dict__", "_orig_mod")
_SUBSCRIPT = re.compile(r"""\[(['"]?)(.+?)\1\]""")


def module_name(node: fx.Node) -> str:
    """The qualified name of the module a node belongs to, within the module given to `torch.compile`.

    That module itself is called by its class; outside any module the function's name is used.
    """
    found, frame = dynamo.module_path(node), dynamo.user_frame(node)
    path, class_name = found or (None, None)
    root = dynamo.root_module(path)
    if root is None and path is None:
        return frame[2] if frame else "attention"
    parts = (_name_of(root), qualified(path or ""))
    return ".".join(part for part in parts if part) or class_name or type(root).__name__


_ATTENTION_OF_LAYER = ".self_attn"


def other_name(node: fx.Node, name: str) -> str:
    """The name a call of nn.TransformerEncoderLayer's has on the path of torch's that was not taken, or nothing."""
    if node.target is dynamo.FUSED_ENCODER_LAYER:
        return name + _ATTENTION_OF_LAYER
    is_whole = node.target is torch.nn.functional.multi_head_attention_forward
    return name.removesuffix(_ATTENTION_OF_LAYER) if is_whole and name.endswith(_ATTENTION_OF_LAYER) else ""


def owner(node: fx.Node) -> tuple[str, str]:
    """(where a node's path starts, the qualified path from there): one pair for each module of a graph.

    It starts at a local variable of the frame, by name, or else at what TorchDynamo wrote (`G['model']`); an empty
    start is a frame that belongs to no module.
    """
    found = dynamo.module_path(node)
    path = found[0] if found else ""
    written = _ROOT.match(path)
    start = written.group(0) if written and not path.startswith("L[") else dynamo.root_local(path)
    return start or "", qualified(path)


def _name_of(module: nn.Module | None) -> str:
    top = dynamo.compiled_module()
    if module is None or top is None:
        return ""
    return next((name for name, candidate in top.named_modules() if candidate is module), "")


def qualified(path: str) -> str:
    """TorchDynamo's path of a module (`L['self'].blocks.slice(...)[3]`) as PyTorch writes qualified names.

    >>> qualified("L['self']._modules['blocks']._modules['3'].attn1")
    'blocks.3.attn1'
    """
    path = _ROOT.sub("", path, count=1)
    path = _SUBSCRIPT.sub(r".\2", path).replace(".forward.__self__", "")  # of a forward bound by hand
    parts = [part for part in path.split(".") if part and part not in _PLUMBING]
    return ".".join(parts)


def source_location(node: fx.Node) -> str:
    """`file:line` of the call in user code, or an empty string."""
    frame = dynamo.user_frame(node)
    return f"{frame[0]}:{frame[1]}" if frame else ""
