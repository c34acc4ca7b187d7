"""Any call that `attention_inputs` draws, through both entries: the meaning is that of dense attention.

Of no item in particular, so no item counts as tested by it.

With every tile kept an output may err by quantization and rounding alone; unquantized, in fp32, hardly at all.
"""

import pytest
import torch
import torch.nn.functional as F
from arms import Arm, item, policy_of
from hypothesis import given, settings
from kernel_cases import KEEP_ALL

from sparge_compile.testing import AttentionInputs, assert_close_to_dense, attention_inputs
from sparge_kernels import ops

EXAMPLES = {"native-direct": 100, "native-compiled": 60, "blocked-direct": 40, "triton-direct": 3, "gpu-direct": 200}
# (max_error, max_row_error): INT8 scores; then unquantized, where 16-bit types still round weights and outputs.
BOUNDS = {
    "int8": dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (0.02, 0.3)),
    "none": {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.012, 0.05), torch.float16: (2e-3, 0.02)},
}


def arm_of(name):
    kernel, entry = name.split("-")
    marks = {"triton": [pytest.mark.interpreted], "gpu": [pytest.mark.gpu]}.get(kernel, [])
    return pytest.param(Arm(kernel, entry), id=name, marks=marks)


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("arm", [arm_of(name) for name in EXAMPLES])
def test_any_call_means_what_it_means_to_dense(arm, precision):
    arm.skip_if_unavailable()
    if arm.kernel == "gpu":
        device, bounds = "cuda", dict.fromkeys(BOUNDS["none"], (0.02, 0.3))  # nothing tighter was seen on a GPU
    else:
        device, bounds = "cpu", BOUNDS[precision]
    policy = policy_of([KEEP_ALL], precision)
    small = {"max_tokens": 66, "max_heads": 1, "max_batch": 1, "max_head_dim": 64} if arm.is_slow else {}

    def attention(q, k, v, attn_mask, is_causal, **call):
        result = arm.run(q, k, v, policy, attn_mask, is_causal, call["scale"], keep_device=True)
        assert result.ran == "sparse" or (arm.kernel == "blocked" and "takes no attn_mask" in result.reason)
        return result.output

    @settings(deadline=None, derandomize=True, database=None, max_examples=EXAMPLES[str(arm)])
    @given(attention_inputs(devices=[device], non_finite=not arm.is_slow, **small))
    def any_call(inputs):
        max_error, max_row_error = bounds[inputs.dtype]
        if arm.is_slow and inputs.dtype != torch.float32:
            max_error = max(max_error, 2 * arm.error(inputs.dtype, precision))  # the interpreter truncates
        assert_close_to_dense(
            attention,
            inputs,
            max_error=max_error,
            max_row_error=max_row_error,
            check_strides=arm.entry == "compiled",
        )

    any_call()


BF16, STRIDED = {"dtype": torch.bfloat16}, {"layouts": ("tokens-first", "sliced", "every-other-token")}
CALLS = {
    "plain": AttentionInputs(129, 65, batch=2, q_heads=4, kv_heads=4, **STRIDED),
    "causal": AttentionInputs(130, 200, q_heads=7, kv_heads=1, head_dim=40, is_causal=True, scale=-0.1, **BF16),
    "padding": AttentionInputs(65, 129, batch=2, q_heads=4, kv_heads=2, mask="padding", values="large-values"),
    "bias": AttentionInputs(70, 130, q_heads=3, kv_heads=3, mask="float-some-see-nothing", values="key-bias"),
}


@item(1, "compiled")
@item(3, "compiled")
@item(4, "compiled")
@item(7, "compiled")
@pytest.mark.parametrize("inputs", CALLS.values(), ids=CALLS.keys())
def test_the_backend_itself_means_what_dense_means(inputs):
    """With Inductor; a call takes seconds, so there are few."""

    def attention(q, k, v, attn_mask, is_causal, scale, enable_gqa):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )

    options = {"sparge.min_tokens": 0, "sparge.topk": 1.0, "sparge.strict": True}
    with ops.record_stats() as records:
        assert_close_to_dense(torch.compile(attention, backend="sparge", options=options), inputs, check_strides=True)
    assert [record.ran for record in records] == ["sparse"]
