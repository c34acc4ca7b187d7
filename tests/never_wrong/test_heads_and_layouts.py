"""Ways to be silently wrong 7, 9 and 12: heads mapped wrongly, layouts read wrongly, inputs written or returned."""

import pytest
import torch
import torch.nn.functional as F
from arms import dense, every_arm, item, per_head_arms
from kernel_cases import HALF, KEEP_ALL, LAYOUTS, both_causal, both_precisions, random_qkv, relative_l1

from sparge_kernels.thresholds import Thresholds

HEADS = [(3, 1), (6, 2), (8, 2), (7, 1), (3, 3), (8, 4)]
OFFSETS = LAYOUTS | {
    "every-other-token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "batch-expanded": lambda x: x[:1].expand_as(x),
    "heads-outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@item(7)
@every_arm
@both_causal
@both_precisions
@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_consecutive_query_heads_share_a_kv_head(arm, is_causal, precision, heads, kv_heads):
    q, k, v = random_qkv(70, 90, heads=heads, kv_heads=kv_heads, batch=2)
    output = arm(q, k, v, is_causal=is_causal, precision=precision).output
    repeated = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    expected = dense(q, *repeated, is_causal)
    error = (output - expected).abs().sum((-2, -1)) / expected.abs().sum((-2, -1))
    assert error.max() < 0.02, f"[batch, head] {error}"


@item(7)
@per_head_arms
@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_query_head_h_reads_kv_head_h_over_group_with_its_own_thresholds(arm, heads, kv_heads):
    q, k, v = random_qkv(200, 260, heads=heads, kv_heads=kv_heads, batch=1 if arm.is_slow else 2)
    thresholds = [Thresholds((h + 1) / heads, 1.0, -1.0, None) for h in range(heads)]
    together = arm(q, k, v, thresholds)
    for h in range(heads):
        kv = h // (heads // kv_heads)
        alone = arm(q[:, h, None], k[:, kv, None], v[:, kv, None], thresholds[h])
        torch.testing.assert_close(together.output[:, h, None], alone.output)
        assert torch.equal(together.density[:, h, None], alone.density)


@item(9)
@item(12)
@every_arm
@both_causal
@pytest.mark.parametrize("layout", OFFSETS.values(), ids=OFFSETS.keys())
def test_every_layout_gives_the_same_result_and_inputs_stay_as_they_were(arm, is_causal, layout):
    views = [layout(x) for x in random_qkv(140, 140, heads=1 if arm.is_slow else 3, batch=2)]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
    result = arm(*views, HALF, is_causal=is_causal)
    expected = arm(*copies, HALF, is_causal=is_causal)
    torch.testing.assert_close(result.output, expected.output)
    assert torch.equal(result.density, expected.density)
    assert all(torch.equal(x, y) for x, y in zip(views, copies, strict=True))
    storages = {x.untyped_storage().data_ptr() for x in views}
    assert result.output.untyped_storage().data_ptr() not in storages


@item(9)
@every_arm
@pytest.mark.parametrize("layout", OFFSETS.values(), ids=OFFSETS.keys())
def test_compiled_calls_have_the_strides_of_dense_and_direct_ones_those_of_the_fake(arm, layout):
    q, k, v = (layout(x) for x in random_qkv(130, 130, heads=3, batch=2))
    output = arm(q, k, v, KEEP_ALL).output
    if arm.entry == "compiled":
        assert output.stride() == F.scaled_dot_product_attention(q, k, v).stride()
    elif arm.entry == "direct":
        fake = torch.ops.sparge.attention(*(x.to("meta") for x in (q, k, v)), thresholds=[1.0, 1.0, -1.0, -1.0])
        assert output.stride() == fake.stride()
    assert relative_l1(output, dense(q, k, v)) < 0.02


@item(12)
@every_arm
@both_causal
@pytest.mark.parametrize("tokens", [1, 64, 130])
def test_the_output_may_be_written_to_and_no_input_changes(arm, is_causal, tokens):
    inputs = random_qkv(tokens, tokens)
    before = [x.clone() for x in inputs]
    arm(*inputs, KEEP_ALL, is_causal=is_causal).output.fill_(7.0)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
