"""Attaching touches nothing but its own compiles, and detaching leaves the modules as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from attached_blocks import X, by_block, keep, net, per_head, profile, whole
from light import Stack
from torch import nn

import sparge_compile as sparge
from sparge_compile import Profile, ProfileError
from sparge_compile.markers import mark


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", None])
def test_other_backends_and_no_backend_run_the_model_as_before(backend):
    model = Stack(2).eval()
    before = [model(X), torch.compile(model, backend=backend)(X) if backend else model(X)]
    torch._dynamo.reset()
    sparge.attach(model, profile(2, "blocks.{}"))
    after = [model(X), torch.compile(model, backend=backend, fullgraph=True)(X) if backend else model(X)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_gradients_flow_under_other_backends():
    model = Stack(1)
    sparge.attach(model, profile(1, "blocks.{}"))
    torch.compile(model, backend="inductor")(X).sum().backward()
    compiled = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(X).sum().backward()
    for one, parameter in zip(compiled, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
def test_an_exported_model_holds_no_marker_and_no_table(strict):
    model = net(2)
    expected = model(X)
    sparge.attach(model, profile(2))
    program = torch.export.export(model, (X,), strict=strict)
    assert not any(node.target is mark for node in program.graph.nodes)
    assert not any("sparge" in key for key in program.state_dict)
    torch.testing.assert_close(program.module()(X), expected)


def snapshot(model: nn.Module) -> list[object]:
    return [
        (name, dict(vars(m)), dict(m._buffers), set(m._non_persistent_buffers_set), dict(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


def test_detaching_leaves_the_model_as_it_was():
    model = net(2)
    before, keys = snapshot(model), list(model.state_dict())
    attachment = sparge.attach(model, profile(2))
    assert list(model.state_dict()) == keys and snapshot(model) != before
    model.load_state_dict(copy.deepcopy(model).state_dict())
    attachment.detach()
    attachment.detach()
    assert snapshot(model) == before
    with pytest.raises(KeyError), sparge.attach(model, profile(2)):
        raise KeyError
    assert snapshot(model) == before


def test_a_second_profile_on_one_module_is_an_error_that_changes_nothing():
    model, own = net(2), profile(2)
    expected = whole(model, own)
    sparge.attach(model, Profile({"blocks.1.attn1": per_head(1)}))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"attached already: detach that.*or update\(\) it"):
        sparge.attach(model, own)
    assert snapshot(model) == before
    sparge.attach(model, Profile({"blocks.0.attn1": per_head(0)}))  # another module: no conflict
    backend = by_block(model)
    assert torch.equal(model(X), expected) and backend.compiles == 1


def test_a_profile_of_another_model_is_an_error_that_changes_nothing():
    model = net(2)
    before = snapshot(model)
    with pytest.raises(
        ProfileError, match=r"another model: Net has no module for 2 of its 4.*blocks.2.attn1, blocks.3"
    ):
        sparge.attach(model, profile(4))
    assert snapshot(model) == before


WRONG = {
    "mixed-calls": (lambda: Profile({"blocks.0": keep(1.0), "blocks.0:1": keep(1.0)}), ProfileError, "as several"),
    "no-profile": (lambda: {"blocks.0": keep(1.0)}, TypeError, "must be a Profile or the path of one"),
    "no-entries": (lambda: Profile({"blocks.0": ()}), ProfileError, "must hold one Thresholds"),
    "numbers": (lambda: Profile({"blocks.0": (0.5,)}), ProfileError, "must hold one Thresholds"),
    "no-file": (lambda: "/no/such/profile.json", ProfileError, "does not exist"),
}


@pytest.mark.parametrize("given, error, message", WRONG.values(), ids=WRONG.keys())
def test_a_profile_that_cannot_be_attached_says_why(given, error, message):
    with pytest.raises(error, match=message):
        sparge.attach(Stack(1), given())


def test_one_module_under_two_names_is_an_error():
    model = Stack(1)
    model.alias = model.blocks[0]
    with pytest.raises(ProfileError, match=r"one module twice, as 'blocks\.0' and 'alias'"):
        sparge.attach(model, Profile({"blocks.0": keep(1.0), "alias": keep(0.5)}))


def test_only_a_module_on_a_real_device_can_be_attached_to():
    with pytest.raises(RuntimeError, match="meta device; load its weights"):
        sparge.attach(Stack(1).to("meta"), profile(1, "blocks.{}"))
    with pytest.raises(TypeError, match=r"takes the nn\.Module"):
        sparge.attach(lambda x: x, profile(1))


def test_tables_lie_on_the_modules_device():
    model = net(1)
    sparge.attach(model, profile(1))
    assert [b.dtype for b in model.buffers()] == [torch.int64]
    model.to("meta")
    assert {b.device.type for b in model.buffers()} == {"meta"}


def wrapped(module: nn.Module) -> list[int]:
    """What offloading libraries do: a forward of the instance's own around the one before. Returns its calls."""
    before, calls = module.forward, []

    def forward(*args):
        calls.append(1)
        return before(*args)

    module.forward = forward
    return calls


def test_a_forward_that_another_library_put_on_the_instance_is_kept_below_and_above():
    model, own = net(1), profile(1)
    expected, attention = whole(model, own), model.blocks[0].attn1
    below = wrapped(attention)
    other = attention.forward
    attachment = sparge.attach(model, own)
    model(X)
    assert below == [1]
    attachment.detach()
    assert attention.forward is other
    attachment = sparge.attach(model, own)
    wrapped(attention)
    attachment.detach()
    model(X)
    attachment = sparge.attach(model, own)
    del below[:]
    model(X)
    assert below == [1]
    backend = by_block(model)
    assert torch.equal(model(X), expected)
    assert backend.sites[-1].threshold_source == "attached profile"


def test_a_copy_of_an_attached_model_is_attached_and_can_be_detached_on_its_own():
    model, own = net(2), profile(2)
    expected = whole(model, own)
    sparge.attach(model, own)
    other = copy.deepcopy(model)
    backend = by_block(other)
    assert torch.equal(other(X), expected) and backend.compiles == 1
    sparge.Attachment.of(other).detach()
    assert list(other.buffers()) == [] and len(list(model.buffers())) == 2
    by_block(model)
    assert torch.equal(model(X), expected)


def test_numbers_attached_in_inference_mode_can_be_updated_outside_it():
    model = net(1)
    with torch.inference_mode(), torch.device("meta"):
        attachment = sparge.attach(model, profile(1))
    attachment.update(profile(1))
    assert next(model.buffers()).device.type == "cpu"
