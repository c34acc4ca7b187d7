"""`assert_close_to_dense` on models: everything they return, take and keep is compared, or refused by its name."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparge_compile import Policy
from sparge_compile.testing import assert_close_to_dense

POLICY = Policy(min_tokens=0, topk=1.0)
X = torch.randn(1, 70, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention of two heads over x [B, S, 32]; gives what `finish` makes of it and whether it is compiled."""

    def __init__(self, finish=lambda out, compiled: out):
        super().__init__()
        self.qkv, self.finish = nn.Linear(32, 96), finish
        self.register_buffer("kept", torch.zeros(32))

    def forward(self, x, generator=None):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.finish(out, torch.compiler.is_compiling())


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    steps: int = 1


class Opaque:
    def __init__(self, hidden):
        self.hidden = hidden


RIGHT = {
    "dataclass": lambda out, compiled: Output(out),
    "numbers": lambda out, compiled: (out, 3, 0.5, "text", None, True, float("nan")),
    "number-nearly": lambda out, compiled: (out, 1.001 if compiled else 1.0),
    "complex": lambda out, compiled: torch.fft.rfft(out),
    "expanded": lambda out, compiled: out[:, :1].clone().expand(1, 70, 32),
}


@pytest.mark.parametrize("finish", RIGHT.values(), ids=RIGHT.keys())
def test_what_is_right_passes(finish):
    assert_close_to_dense(Block(finish).eval(), X, policy=POLICY)


WRONG = {
    "in-a-dataclass": (lambda out, compiled: (out, Output(out + 9 * compiled)), r"output\[1\]\.hidden"),
    "of-a-dataclass": (lambda out, compiled: Output(out, 2 if compiled else 1), r"output\.steps is 2, dense: 1"),
    "integer": (lambda out, compiled: (out, 2 if compiled else 1), r"output\[1\] is 2, dense: 1"),
    "number": (lambda out, compiled: [out, 2.0 if compiled else 1.0], r"output\[1\] is 2.0, dense: 1.0"),
    "nothing": (lambda out, compiled: [out, None if compiled else 1.0], r"output\[1\] is None, dense: 1.0"),
    "complex": (lambda out, compiled: torch.fft.rfft(out) * (2 if compiled else 1), "rows are too far off"),
}


@pytest.mark.parametrize(("finish", "message"), WRONG.values(), ids=WRONG.keys())
def test_every_part_of_an_output_is_compared(finish, message):
    with pytest.raises(AssertionError, match=message):
        assert_close_to_dense(Block(finish).eval(), X, policy=POLICY)


@pytest.mark.parametrize(("make", "kind"), [(Opaque, "Opaque"), (lambda out: {1}, "set")], ids=["object", "set"])
def test_what_cannot_be_compared_is_an_error_that_names_it(make, kind):
    model = Block(lambda out, compiled: {"hidden": out, "cache": make(out)}).eval()
    with pytest.raises(TypeError, match=rf"output\['cache'\] \({kind}\)"):
        assert_close_to_dense(model, X, policy=POLICY)


class Keeping(Block):
    """Counts in its buffer; `wrong` is added where it is compiled."""

    def __init__(self, wrong=0.0):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        out = super().forward(x + self.kept)
        self.kept.add_(1.0 + self.wrong * torch.compiler.is_compiling())
        return out


class Rebinding(Block):
    def forward(self, x):
        out = super().forward(x + self.kept)
        self.kept = self.kept + 1.0
        return out


@pytest.mark.parametrize("kind", [Keeping, Rebinding])
def test_both_runs_find_the_buffers_as_they_were_and_so_does_the_caller(kind):
    model = kind().eval()
    before = model.kept
    assert_close_to_dense(model, X, policy=POLICY)
    assert model.kept is before and torch.equal(before, torch.zeros(32))


def test_a_buffer_written_otherwise_than_densely_is_caught():
    model = Keeping(wrong=100.0).eval()
    with pytest.raises(AssertionError, match="buffer 'kept'"):
        assert_close_to_dense(model, X, policy=POLICY)
    assert torch.equal(model.kept, torch.zeros(32))


def test_arguments_may_be_computed_from_parameters_and_hold_generators():
    x = nn.Linear(32, 32)(X)
    assert x.grad_fn is not None
    assert_close_to_dense(Block().eval(), x, policy=POLICY)
    assert_close_to_dense(Block().eval(), X, generator=torch.Generator(), policy=POLICY)


def test_a_model_in_training_mode_is_told_to_call_eval():
    with pytest.raises(AssertionError, match=r"training mode.*call eval\(\) first"):
        assert_close_to_dense(nn.Sequential(Block(), nn.Dropout(0.5)), X, policy=POLICY)
    with pytest.raises(AssertionError) as error:
        assert_close_to_dense(Block(lambda out, compiled: out + compiled).eval(), X, policy=POLICY)
    assert "training mode" not in str(error.value)


def test_a_model_compiled_with_another_backend_is_told_so():
    with pytest.raises(AssertionError, match="compiled already, with another backend than sparge"):
        assert_close_to_dense(torch.compile(Block().eval(), backend="eager"), X, policy=POLICY)
