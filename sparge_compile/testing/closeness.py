"""`assert_close_to_dense`: an attention function, or a whole model, against its dense counterpart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile.policy import Policy
from sparge_compile.testing.inputs import AttentionInputs
from sparge_compile.testing.measures import Bounds, compare
from sparge_compile.testing.models import check_model
from sparge_compile.testing.values import same_bits, strides
from sparge_compile.testing.visible import dense_over_visible_keys


def assert_close_to_dense(
    function: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | None = None,
    policy: Policy | None = None,
    max_error: float | None = None,
    max_row_error: float = 0.3,
    check_strides: bool = False,
    **kwargs: Any,
) -> None:
    """Runs a function or model and its dense counterpart without gradients, and asserts that they agree.

    Two uses:

    `assert_close_to_dense(attention, inputs)`: a function with the signature of `F.scaled_dot_product_attention`
    (compiled or not) on an `AttentionInputs`, against dense attention in fp64. Also asserts that the output is a tensor
    of its own, with the shape and dtype of dense, and that no input was written, nor the memory around it. Where dense
    has NaN only because it multiplies a hidden NaN or inf by 0, NaN is right, and so is what the visible keys give.

    `assert_close_to_dense(model, *args, **kwargs)`: a module or function that calls attention inside. It is compiled
    with backend="sparge" under `policy` and compared with itself run eagerly and densely, on copies of the arguments:
    every tensor and number it returns, in tuples, lists, mappings and dataclasses; every argument, which must be
    written or left alone as there; and the buffers of a module, which both runs find, and the caller finds again, as
    they were before. At least one attention call must have run sparsely, else dense was compared with dense. The model
    must be deterministic, so call eval() first.

    Args:
        function: what to test. A compiled model, or one with compiled blocks, is tested as it is.
        *args, **kwargs: one `AttentionInputs`, or what to call the model with.
        reference: another dense counterpart, called with the same arguments. Buffers are then not compared.
        policy: for models: None is the policy in force. Calls shorter than its `min_tokens` stay dense.
        max_error: bound on sum|o - o_dense| / sum|o_dense|, each tensor apart; of integers, on the share that differs.
            An attention call may always be off by 2^-9 (a rounding of bf16; max_error, if less) of dense attention over
            |value|. None: 0.02 for a call, 0.05 for a model.
        max_row_error: bound on |o - o_dense| / |o_dense| of every row (a vector along the last dimension); 0.3 means a
            cosine of at least .954. A row of an attention call is never at fault within 2^-8 (max_error, if less) of
            dense attention over |value|, a row of a model's within max_error of the mean row: where values cancel,
            nothing is left to compare with. Few numbers cancel more often: times 1 + 40 / numbers for a call,
            1 + 8 / numbers for a row.
        check_strides: for attention calls: strides must be those of `F.scaled_dot_product_attention` too, as
            compiled code promises (`sparge.attention` does not). Those of a model's outputs always must be.

    Raises:
        AssertionError: they differ; its text has the worst row (batch, head and query), both errors and their bounds,
            and what to do.
        TypeError: policy for an attention call, or a model that returns no tensor or what cannot be compared.
    """
    if len(args) == 1 and isinstance(args[0], AttentionInputs) and not kwargs:
        if policy is not None:
            raise TypeError("policy= is for models; give an attention function its own, with functools.partial, say.")
        bounds = Bounds(0.02 if max_error is None else max_error, max_row_error)
        _check_call(function, args[0], reference, bounds, check_strides)
    else:
        bounds = Bounds(0.05 if max_error is None else max_error, max_row_error)
        check_model(function, args, kwargs, reference, policy, bounds)


def _check_call(
    function: Callable[..., Any],
    inputs: AttentionInputs,
    reference: Callable[..., Any] | None,
    bounds: Bounds,
    check_strides: bool,
) -> None:
    named = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "attn_mask": inputs.attn_mask}
    present = {name: x for name, x in named.items() if x is not None}
    before = {name: (x.clone(), _whole_storage(x).clone()) for name, x in present.items()}
    with torch.no_grad():
        output = inputs.call(function)
        expected = inputs.dense() if reference is None else inputs.call(reference)
    if not isinstance(output, Tensor):
        raise AssertionError(f"the output is {type(output).__name__}, not a tensor.\n{inputs}")
    for name, x in present.items():
        view, memory = before[name]
        if not same_bits(x, view):
            raise AssertionError(f"the call wrote to its {name}.\n{inputs}")
        if not torch.equal(_whole_storage(x), memory):
            raise AssertionError(f"the call wrote to the memory around its {name}, which is a view.\n{inputs}")
        if output.numel() and output.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            raise AssertionError(f"the output is memory of the {name}; return a tensor of its own.\n{inputs}")
    if output.dtype != inputs.dtype:
        raise AssertionError(f"the output is {output.dtype}, dense gives {inputs.dtype}.\n{inputs}")
    if check_strides:
        with torch.no_grad():
            actual, wanted = strides(output), strides(inputs.call(F.scaled_dot_product_attention))
        if actual != wanted:
            raise AssertionError(f"strides are {list(actual)}, those of dense are {list(wanted)}.\n{inputs}")
    magnitude = inputs.magnitude()
    if reference is None:
        expected, magnitude = _without_avoidable_nan(inputs, output, expected, magnitude)
    problem = compare(output, expected, magnitude, bounds, ("batch", "head", "query"))
    if problem is not None:
        raise AssertionError(f"{problem}\n{inputs}")


def _without_avoidable_nan(
    inputs: AttentionInputs, output: Tensor, expected: Tensor, magnitude: Tensor
) -> tuple[Tensor, Tensor]:
    """(expected, magnitude), over visible keys where dense has a NaN that it need not have, and the output has none."""
    hides = inputs.is_causal or inputs.mask is not None
    if not hides or output.shape != expected.shape or not expected.isnan().any():
        return expected, magnitude
    visible = dense_over_visible_keys(inputs, inputs.value)
    avoided = expected.isnan() & ~visible.isnan() & ~output.isnan()
    of_visible = dense_over_visible_keys(inputs, inputs.value.abs())
    return torch.where(avoided, visible, expected), torch.where(avoided, of_visible, magnitude)


def _whole_storage(x: Tensor) -> Tensor:
    """Every byte of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
