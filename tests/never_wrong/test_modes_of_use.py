"""Training, transforms, regions and strictness through a compile: what is not plain inference stays as it was."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from arms import item
from light import CLOSE, EXACT, Attention, is_rewritten, qkv, run, stays_dense
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparge_compile import Policy, Profile, StrictPolicyError
from sparge_compile.backend import transform
from sparge_kernels import ops
from sparge_kernels.thresholds import Thresholds, pack

SDPA = F.scaled_dot_product_attention
T = 12


@item(10, "compiled")
def test_dropout_keeps_training_dense_and_eval_is_rewritten():
    class Dropping(Attention):
        def forward(self, x):
            self.arguments = {"dropout_p": 0.5 if self.training else 0.0}
            return super().forward(x)

    model, x = Dropping(), torch.randn(1, 6, 16)
    _, backend = run(model.train(), x)
    assert "dropout_p=0.5" in backend.reason and not backend.operators()
    torch._dynamo.reset()
    is_rewritten(model.eval(), x)


GRADS = {"query": (True, False, False), "key": (False, True, False), "value": (False, False, True)}


@item(10, "compiled")
@pytest.mark.parametrize("flags", GRADS.values(), ids=GRADS.keys())
def test_one_input_that_needs_a_gradient_keeps_the_site_dense(flags):
    inputs = [x.requires_grad_(flag) for x, flag in zip(qkv(), flags, strict=True)]
    _, backend = run(lambda q, k, v: SDPA(q, k, v), *inputs, grad=True)
    assert "gradient" in backend.reason
    _, without = run(lambda q, k, v: SDPA(q, k, v), *inputs)
    assert without.rewritten == [True]


@item(10, "compiled")
def test_a_no_grad_region_in_a_trained_model_is_rewritten_and_the_rest_still_learns():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = Attention(), nn.Linear(16, 4)

        def forward(self, x):
            with torch.no_grad():
                x = self.attention(x)
            return self.head(x)

    model, x, sites = Frozen(), torch.randn(2, 6, 16), []
    forward = aot_autograd(fw_compiler=lambda gm, _: gm)

    def backend(gm, inputs):
        sites.extend(transform(gm, EXACT))
        return forward(gm, inputs)

    compiled = torch.compile(model, backend=backend)
    ours = compiled(x)
    ours.sum().backward()
    grad = model.head.weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    assert [site.rewritten for site in sites] == [True]
    torch.testing.assert_close(grad, model.head.weight.grad, **CLOSE)


def test_inference_mode_is_rewritten():
    inputs = qkv()
    with torch.inference_mode():
        out, backend = run(lambda q, k, v: SDPA(q, k, v), *inputs)
        torch.testing.assert_close(out, SDPA(*inputs), **CLOSE)
    assert backend.rewritten == [True]


@item(12, "compiled")
def test_writes_around_the_call_keep_their_order():
    def function(q, k, v):
        k.mul_(2)
        out = SDPA(q, k, v)
        v.zero_()
        out.add_(1)
        return out, k, v

    inputs = qkv()
    expected = function(*(x.clone() for x in inputs))
    out, backend = run(function, *(x.clone() for x in inputs))
    assert backend.rewritten == [True]
    torch.testing.assert_close(out, expected, **CLOSE)


@item(15, "compiled")
def test_strict_raises_with_every_reason_and_dense_patterns_do_not():
    inputs = qkv(dtype=torch.float64)

    def precise(q, k, v):
        return SDPA(q, k, v)

    strict = Policy(min_tokens=0, strict=True)
    with pytest.raises(Exception, match=r"precise \(.*test_modes_of_use.py:\d+\): dtype torch.float64") as error:
        run(precise, *inputs, policy=strict)
    assert isinstance(getattr(error.value, "inner_exception", error.value), StrictPolicyError)
    torch._dynamo.reset()
    _, backend = run(precise, *inputs, policy=Policy(min_tokens=0, strict=True, dense=("prec*",)))
    assert "dense pattern 'prec*'" in backend.reason
    torch._dynamo.reset()
    _, backend = run(precise, *inputs, policy=Policy(strict=True, enabled=False))
    assert "enabled=False" in backend.reason


@item(15, "compiled")
def test_nothing_rewritten_is_said_out_loud_and_something_rewritten_is_not():
    backend = run(SDPA, *qkv())[1]
    backend.policy = Policy(min_tokens=99)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"none of 1 attention calls.*\n.*min_tokens is 99"):
        torch.compile(lambda q: SDPA(q, q, q), backend=backend)(qkv()[0])


def test_a_step_of_decoding_is_not_said_out_loud_but_reported():
    q, k, v = qkv()
    backend = run(SDPA, q, k, v)[1]
    backend.policy = Policy(min_tokens=9)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(lambda q, k, v: SDPA(q, k, v), backend=backend)(q[:, :, :1], k, v)
    assert backend.rewritten[-1] is False


def test_a_chosen_kernel_is_left_alone():
    def function(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return SDPA(q, k, v)

    stays_dense(function, *qkv(), reason="sdpa_kernel")


def test_vmap_is_left_alone():
    stays_dense(lambda q, k, v: torch.vmap(SDPA)(q[None], k[None], v[None]), *qkv(), reason="vmap")


@item(10, "compiled")
def test_torch_func_gradients_are_left_alone_and_right():
    def function(q, k, v):
        return torch.func.grad(lambda q: SDPA(q, k, v).square().sum())(q)

    stays_dense(function, *qkv(), reason="torch.func")


@item(10, "compiled")
def test_forward_mode_derivatives_are_left_alone_and_right():
    def function(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda q: SDPA(q, k, v), (q,), (torch.ones_like(q),))[1]

    stays_dense(function, *qkv())


@item(10, "compiled")
def test_activation_checkpointing_is_left_alone():
    def function(q, k, v):
        return torch.utils.checkpoint.checkpoint(lambda q: SDPA(q, k, v), q, use_reentrant=False)

    stays_dense(function, *qkv(), reason="higher-order operator")


def test_fullgraph_compiles_in_one_piece():
    backend = is_rewritten(Attention().eval(), torch.randn(1, 6, 16), fullgraph=True)
    assert backend.compiles == 1


def test_a_profile_sets_thresholds_by_site_and_head_and_refuses_other_head_counts():
    heads = (Thresholds(0.5, 0.9, 0.5, None), Thresholds(None, 0.8, 0.1, -3.0))
    for entries in (heads, heads[:1], heads * 2):
        torch._dynamo.reset()
        _, backend = run(
            Attention().eval(),
            torch.randn(1, 6, 16),
            policy=Policy(min_tokens=0, profile=Profile({"Attention": entries})),
        )
        if len(entries) > 2:
            assert "4 heads" in backend.reason
        else:
            assert backend.operators()[0].kwargs["thresholds"] == pack(entries)


@item(15, "compiled")
def test_rewritten_calls_really_run_the_sparse_kernel():
    inputs = qkv(tokens=300)
    with ops.record_stats() as records:
        run(lambda q, k, v: SDPA(q, k, v), *inputs, policy=Policy(min_tokens=0, topk=0.2, similarity_threshold=-1.0))
    assert [record.ran for record in records] == ["sparse"] and records[0].density.max() < 1
