"""One compiled model trains, evaluates sparse, and trains again: gradients are those of a model never rewritten."""

import copy
import warnings

import pytest
import torch
from light import CLOSE, EXACT, EXACT_OPTIONS, Attention, LightBackend, Stack, qkv
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparge_compile as sparge
from sparge_kernels import ops

SDPA = torch.nn.functional.scaled_dot_product_attention

X = torch.randn(2, 6, 16)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def train(compiled, x=X):
    """The loss; its gradients are left in the parameters."""
    loss = compiled(x).square().mean()
    loss.backward()
    return loss.detach()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def evaluate(compiled, mode=torch.no_grad, x=X):
    """(the output, what ran: `sparse` or `dense` for each call of the operator)."""
    with mode(), ops.record_stats() as records:
        out = compiled(x)
    return out, [record.ran for record in records]


def same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys() and all(grad is not None for grad in ours.values())
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


EXACTLY = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("first", ["train", "eval"])
def test_train_eval_train_through_inductor(mode, first):
    """Two steps of SGD with an evaluation before, between and after; beside it the same on backend="inductor"."""
    ours, theirs = (Stack(2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, backend="sparge", options=EXACT_OPTIONS)
    plain = torch.compile(theirs, backend="inductor")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    if first == "eval":
        assert evaluate(compiled, mode)[1] == ["sparse"] * 2
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with ops.record_stats() as records:
            loss = train(compiled)
        assert records == [] and torch.equal(loss, train(plain))
        same(gradients(ours), gradients(theirs), **EXACTLY)
        for optimizer in optimizers:
            optimizer.step()
        out, ran = evaluate(compiled, mode)
        assert ran == ["sparse"] * 2
        torch.testing.assert_close(out, evaluate(plain, mode)[0], **CLOSE)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_gradients_of_the_inputs_are_those_of_dense():
    model, backend = Stack(1), LightBackend()
    compiled = torch.compile(model, backend=backend)
    evaluate(compiled)
    ours, theirs = (X.clone().requires_grad_() for _ in range(2))
    train(compiled, ours)
    train(copy.deepcopy(model), theirs)
    assert backend.rewritten == [True, False] and "gradient" in backend.sites[1].reason
    assert torch.equal(ours.grad, theirs.grad)


def torch_notices_unfreezing():
    compiles, layer = [], nn.Linear(16, 16)
    compiled = torch.compile(layer, backend=lambda gm, _: compiles.append(gm) or gm.forward)
    for wanted in (False, True):
        layer.requires_grad_(wanted)
        compiled(X)
    return len(compiles) == 2


def test_freezing_and_unfreezing_the_parameters_is_noticed():
    """Frozen, the model needs no gradient even in grad mode; the same graph must not serve it once it learns again."""
    if not torch_notices_unfreezing():
        pytest.skip("torch 2.11 has no guard on requires_grad of parameters: backend='inductor' loses gradients too")
    model, backend = Attention(), LightBackend()
    compiled = torch.compile(model, backend=backend)
    for wanted in (False, True, False, True):
        model.requires_grad_(wanted)
        out = compiled(X)
        assert out.requires_grad == wanted
        torch.testing.assert_close(out, model(X), **CLOSE)
    assert backend.rewritten == [True, False]


def test_adapters_that_learn_on_a_frozen_model_keep_their_gradients():
    class Adapted(Attention):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.adapter = nn.Linear(16, 16)

        def forward(self, x):
            return super().forward(x + self.adapter(x))

    model, backend = Adapted(), LightBackend()
    reference = copy.deepcopy(model)
    train(torch.compile(model, backend=backend))
    train(reference)
    assert backend.rewritten == [False]
    assert torch.equal(model.adapter.weight.grad, reference.adapter.weight.grad)
    assert reference.adapter.weight.grad.abs().max() > 0


def test_sites_before_the_part_that_learns_are_rewritten_and_the_part_learns_the_same():
    """A frozen backbone in grad mode: its call needs no gradient, the head's does."""

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.learning = Attention().requires_grad_(False), Attention()

        def forward(self, x):
            return self.learning(self.frozen(x))

    model, backend = Backbone(), LightBackend()
    reference = copy.deepcopy(model)
    train(torch.compile(model, backend=backend))
    train(reference)
    assert [(site.name, site.rewritten) for site in backend.sites] == [("frozen", True), ("learning", False)]
    same(gradients(model.learning), gradients(reference.learning), **CLOSE)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("where", ["inside", "around"])
def test_activation_checkpointing_trains_as_dense_and_evaluates_right(where):
    if where == "inside":
        model, backend = Checkpointed(), LightBackend()
        reference = copy.deepcopy(model)
        compiled = torch.compile(model, backend=backend)
    else:
        model, backend = Stack(2), LightBackend()
        reference = copy.deepcopy(model)
        block = torch.compile(model, backend=backend)

        def compiled(x):
            return checkpoint(block, x, use_reentrant=False)

    for _ in range(2):
        model.zero_grad(), reference.zero_grad()
        train(compiled)
        train(reference)
        same(gradients(model), gradients(reference), **CLOSE)
        out, ran = evaluate(compiled)
        torch.testing.assert_close(out, reference(X).detach(), **CLOSE)
    assert ran == (["sparse"] * 2 if where == "around" else [])
    assert backend.rewritten == ([False] * 4 if where == "inside" else [False, False, True, True])


def test_activation_checkpointing_through_inductor():
    model = Checkpointed()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="sparge", options=EXACT_OPTIONS)
    train(compiled)
    train(reference)
    same(gradients(model), gradients(reference), **CLOSE)


def test_scaled_training_under_autocast_evaluates_sparse_in_the_autocast_dtype():
    model, backend = Stack(1), LightBackend()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            model.zero_grad(), reference.zero_grad()
            train(compiled)
            train(reference)
            same(gradients(model), gradients(reference), **EXACTLY)
            out, ran = evaluate(compiled)
            assert ran == ["sparse"] and backend.sites[-1].dtype == "bfloat16"
            torch.testing.assert_close(out, evaluate(reference)[0], rtol=2e-2, atol=2e-2)


def in_a_region(q, k, v):
    with torch.no_grad():
        return SDPA(q, k, v)


def written_out_in_a_region(q, k, v):
    with torch.no_grad():
        return (q @ k.mT * 0.3).softmax(-1) @ v


def detached_weights(q, k, v):
    return (q @ k.mT * 0.3).softmax(-1).detach() @ v


REGIONS = {"call": in_a_region, "written-out": written_out_in_a_region, "detached": detached_weights}


@pytest.mark.parametrize("backend", ["light", "sparge"])
@pytest.mark.parametrize("function", REGIONS.values(), ids=REGIONS.keys())
def test_attention_without_gradients_in_a_function_with_them(function, backend):
    q, k, v = qkv()
    q.requires_grad_()
    expected = function(q, k, v)
    light = LightBackend(EXACT)
    options = {} if backend == "light" else {"options": EXACT_OPTIONS}
    actual = torch.compile(function, backend=light if backend == "light" else "sparge", **options)(q, k, v)
    torch.testing.assert_close(actual, expected, **CLOSE)
    sites = light.sites if backend == "light" else sparge.last_report().sites
    assert [site.rewritten for site in sites] == [True] and not actual.requires_grad
