"""`assert_close_to_dense`: an attention function, or a whole model, against its dense counterpart."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile import context, dynamo
from sparge_compile.explain import explain
from sparge_compile.policy import Policy
from sparge_compile.testing.inputs import AttentionInputs
from sparge_compile.testing.measures import Bounds, compare
from sparge_kernels import ops


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
    of its own, with the shape and dtype of dense, and that no input was written.

    `assert_close_to_dense(model, *args, **kwargs)`: a module or function that calls attention inside. It is compiled
    with backend="sparge" under `policy` and compared with itself run eagerly and densely, on copies of the arguments:
    every tensor it returns, in tuples, lists and mappings, and every argument, which must be written or left alone as
    there. At least one attention call must have run sparsely, else dense was compared with dense. The model must be
    deterministic, so call eval() first.

    Args:
        function: what to test. A compiled model, or one with compiled blocks, is tested as it is.
        *args, **kwargs: one `AttentionInputs`, or what to call the model with.
        reference: another dense counterpart, called with the same arguments.
        policy: for models: None is the policy in force. Calls shorter than its `min_tokens` stay dense.
        max_error: bound on sum|o - o_dense| as a share of what the output is made of: dense attention over |value|
            for an attention call, sum|o_dense| for a model, each tensor apart; of integers, on the share that differs.
            None: 0.02 for a call, 0.05 for a model.
        max_row_error: bound on |o - o_dense| / |o_dense| of every row (a vector along the last dimension); 0.3 means a
            cosine of at least .954. A row within max_error of what rows are made of (for a model, the mean row) is
            never at fault: where values cancel, nothing is left to compare with.
        check_strides: for attention calls: strides must be those of `F.scaled_dot_product_attention` too, as
            compiled code promises (`sparge.attention` does not). Those of a model's outputs always must be.

    Raises:
        AssertionError: they differ; its text has the worst row (batch, head and query), both errors and their bounds,
            and what to do.
        TypeError: policy for an attention call, or a model that returns no tensor.
    """
    if len(args) == 1 and isinstance(args[0], AttentionInputs) and not kwargs:
        if policy is not None:
            raise TypeError("policy= is for models; give an attention function its own, with functools.partial, say.")
        bounds = Bounds(0.02 if max_error is None else max_error, max_row_error)
        _check_call(function, args[0], reference, bounds, check_strides)
    else:
        bounds = Bounds(0.05 if max_error is None else max_error, max_row_error)
        _check_model(function, args, kwargs, reference, policy, bounds)


def _check_call(
    function: Callable[..., Any],
    inputs: AttentionInputs,
    reference: Callable[..., Any] | None,
    bounds: Bounds,
    check_strides: bool,
) -> None:
    named = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "attn_mask": inputs.attn_mask}
    present = {name: x for name, x in named.items() if x is not None}
    before = {name: x.clone() for name, x in present.items()}
    with torch.no_grad():
        output = inputs.call(function)
        expected = inputs.dense() if reference is None else inputs.call(reference)
    if not isinstance(output, Tensor):
        raise AssertionError(f"the output is {type(output).__name__}, not a tensor.\n{inputs}")
    for name, x in present.items():
        if not _same_bits(x, before[name]):
            raise AssertionError(f"the call wrote to its {name}.\n{inputs}")
        if output.numel() and output.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            raise AssertionError(f"the output is memory of the {name}; return a tensor of its own.\n{inputs}")
    if output.dtype != inputs.dtype:
        raise AssertionError(f"the output is {output.dtype}, dense gives {inputs.dtype}.\n{inputs}")
    if check_strides:
        with torch.no_grad():
            actual, wanted = _strides(output), _strides(inputs.call(F.scaled_dot_product_attention))
        if actual != wanted:
            raise AssertionError(f"strides are {list(actual)}, those of dense are {list(wanted)}.\n{inputs}")
    allowed_nan = _nan_where_a_hidden_number_may_spoil(inputs, expected) if reference is None else None
    problem = compare(output, expected, inputs.magnitude(), bounds, ("batch", "head", "query"), allowed_nan)
    if problem is not None:
        raise AssertionError(f"{problem}\n{inputs}")


def _nan_where_a_hidden_number_may_spoil(inputs: AttentionInputs, expected: Tensor) -> Tensor | None:
    """Where dense has NaN that it need not have: dense multiplies a hidden NaN by 0, others never meet it."""
    if not expected.isnan().any() or (inputs.mask is None and not inputs.is_causal):
        return None
    return expected.isnan() & ~_dense_over_visible_keys(inputs).isnan()


def _dense_over_visible_keys(inputs: AttentionInputs) -> Tensor:
    """Dense attention row by row, each over the keys it may attend to."""
    shape = (inputs.batch, inputs.q_heads, inputs.q_len, inputs.k_len)
    mask, bias = inputs.attn_mask, None
    if mask is None:
        visible = torch.ones(shape[2:], dtype=torch.bool, device=inputs.device).tril().expand(shape)
    elif mask.dtype == torch.bool:
        visible = mask.expand(shape)
    else:
        bias = mask.double().expand(shape)
        visible = bias > -torch.inf
    group = inputs.q_heads // inputs.kv_heads
    out = torch.zeros((*shape[:3], inputs.value_head_dim), dtype=torch.float64, device=inputs.device)
    for batch, head, row in ((b, h, r) for b in range(shape[0]) for h in range(shape[1]) for r in range(shape[2])):
        seen = visible[batch, head, row]
        if seen.any():
            out[batch, head, row] = F.scaled_dot_product_attention(
                inputs.query[batch, head, row].double()[None, None, None],
                inputs.key[batch, head // group, seen].double()[None, None],
                inputs.value[batch, head // group, seen].double()[None, None],
                attn_mask=None if bias is None else bias[batch, head, row, seen][None, None, None],
                scale=inputs.scale,
            ).flatten()
    return out


def _check_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reference: Callable[..., Any] | None,
    policy: Policy | None,
    bounds: Bounds,
) -> None:
    target, _ = dynamo.uncompiled(model)
    compiled = model if dynamo.is_compiled(model) else torch.compile(model, backend="sparge")
    given = (args, kwargs)
    dense_given, sparse_given, spare = (copy.deepcopy(given) for _ in range(3))
    with torch.no_grad(), context.rewriting(enabled=False), dynamo.not_compiled_in_place(target):
        expected = (reference or target)(*dense_given[0], **dense_given[1])
    wanted = dict(_tensors(expected, "output"))
    if not wanted:
        raise TypeError(f"the model returns {type(expected).__name__}, in which there is no tensor to compare.")
    with torch.no_grad(), _under(policy), ops.record_stats() as records:
        output = compiled(*sparse_given[0], **sparse_given[1])
    if not any(record.ran == "sparse" for record in records):
        report = explain(model, *spare[0], policy=policy, **spare[1])
        raise AssertionError(f"no attention call ran sparsely, so there is nothing to compare.\n{report}")
    actual = dict(_tensors(output, "output"))
    if wanted.keys() != actual.keys():
        raise AssertionError(f"the model returns {', '.join(actual)}; run densely it returns {', '.join(wanted)}.")
    for name, x in wanted.items():
        _check_output(name, actual[name], x, bounds)
    _check_arguments(given, dense_given, sparse_given, bounds)


def _under(policy: Policy | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if policy is None else context.rewriting(policy)


def _check_output(name: str, output: Tensor, expected: Tensor, bounds: Bounds) -> None:
    for what in ("dtype", "shape", "device"):
        if getattr(output, what) != getattr(expected, what):
            raise AssertionError(f"{name}: {what} is {getattr(output, what)}, dense: {getattr(expected, what)}.")
    if _strides(output) != _strides(expected):
        raise AssertionError(f"{name}: strides are {list(output.stride())}, dense: {list(expected.stride())}.")
    problem = compare(output, expected, None, bounds, None)
    if problem is not None:
        raise AssertionError(
            f"{name} {list(output.shape)}: {problem}\nsparge.explain lists the attention calls; sparge.calibrate finds "
            "thresholds for a bound, Policy(dense=...) keeps calls dense, precision='none' does without INT8."
        )


def _check_arguments(given: Any, dense: Any, sparse: Any, bounds: Bounds) -> None:
    before, after_sparse = dict(_tensors(given, "argument")), dict(_tensors(sparse, "argument"))
    for name, x in _tensors(dense, "argument"):
        if name not in before or name not in after_sparse:
            continue  # the model takes containers apart
        if not _same_bits(x, before[name]):
            _check_output(name, after_sparse[name], x, bounds)
        elif not _same_bits(after_sparse[name], x):
            raise AssertionError(f"{name}: the compiled model writes to it, the dense one does not.")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nest of tuples, lists and mappings by its place."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(entry, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _tensors(entry, f"{name}[{index}]")


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(0.0), y.nan_to_num(0.0))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions along which anything moves."""
    return tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1) if x.numel() else ()
