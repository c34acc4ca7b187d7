"""The first steps of a diffusion loop stay dense, and switching compiles nothing anew."""

from __future__ import annotations

import asyncio
import inspect

import pytest
import torch
from light import EXACT_FIELDS, Attention, LightBackend
from torch import Tensor

import sparge_compile as sparge
from sparge_compile import Policy, context

X = torch.randn(1, 12, 16)
SPARSE = Policy(**EXACT_FIELDS)


class Pipeline:
    """A denoising loop that calls back as diffusers' do, and notes which steps ran sparse."""

    def __init__(self, steps: int = 6) -> None:
        self.steps = steps
        self.backend = LightBackend(SPARSE)
        self.denoiser = torch.compile(Attention().eval().requires_grad_(False), backend=self.backend)
        self.sparse: list[bool] = []
        self.returned: list[dict[str, Tensor]] = []

    def __call__(self, callback_on_step_end=None, fails_after: int | None = None) -> list[bool]:
        self.sparse = []
        for i, t in enumerate(torch.linspace(1000, 1, self.steps)):
            self.sparse.append(context.in_force(SPARSE).enabled)
            self.denoiser(X)
            if i == fails_after:
                raise KeyError(i)
            if callback_on_step_end is not None:
                callback_kwargs = {"latents": X}
                assert callback_on_step_end(self, i, t, callback_kwargs) is callback_kwargs
        return self.sparse


@pytest.mark.parametrize("count", [0, 1, 3, 6, 9])
def test_the_first_steps_are_dense_and_the_rest_sparse(count):
    pipe = Pipeline()
    with sparge.dense_steps(count) as on_step_end:
        assert pipe(on_step_end) == [step >= count for step in range(6)]
    assert context.in_force(SPARSE).enabled
    assert pipe.backend.compiles == len(set(pipe.sparse))


def test_a_switch_compiles_nothing_anew_once_both_variants_exist():
    pipe = Pipeline()
    for count in (2, 3, 1, 5):
        with sparge.dense_steps(count) as on_step_end:
            assert pipe(on_step_end) == [step >= count for step in range(6)]
    assert pipe.backend.compiles == 2 and sorted(pipe.backend.rewritten) == [False, True]


def test_a_loop_of_ones_own_needs_rewriting_only():
    backend = LightBackend(SPARSE)
    model = Attention().eval().requires_grad_(False)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        for step in range(5):
            with sparge.rewriting(enabled=step >= 2):
                compiled(X)
    assert backend.compiles == 2


@pytest.mark.parametrize("step", [0, 4], ids=["while-dense", "while-sparse"])
def test_what_was_in_force_before_is_back_after_an_error(step):
    pipe = Pipeline()
    with sparge.rewriting(topk=0.3):
        before = context.in_force(SPARSE)
        with pytest.raises(KeyError), sparge.dense_steps(2) as on_step_end:
            pipe(on_step_end, fails_after=step)
        assert context.in_force(SPARSE) == before


def test_the_steps_after_follow_the_policy_around():
    with sparge.rewriting(topk=0.3), sparge.dense_steps(1) as on_step_end:
        assert not context.in_force(SPARSE).enabled
        on_step_end(None, 0, 999, {})
        assert context.in_force(SPARSE).topk == 0.3 and context.in_force(SPARSE).enabled


def test_one_object_entered_anew_for_each_call():
    pipe, first_two = Pipeline(), sparge.dense_steps(2)
    for _ in range(3):
        with first_two as on_step_end:
            assert pipe(on_step_end) == [False, False, True, True, True, True]


def test_a_second_call_inside_one_context_is_said_out_loud_and_its_other_first_steps_are_dense():
    pipe = Pipeline()
    with sparge.dense_steps(3) as on_step_end:
        pipe(on_step_end)
        with pytest.warns(UserWarning, match="Enter dense_steps anew for each call"):
            assert pipe(on_step_end) == [True, False, False, True, True, True]


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [(-1, ValueError, "must be 0 or more"), (2.0, TypeError, "not float"), (True, TypeError, "not bool")],
    ids=["negative", "float", "bool"],
)
def test_a_wrong_count_is_an_error_in_words(count, error, message):
    with pytest.raises(error, match=message):
        sparge.dense_steps(count)


def test_the_callback_has_diffusers_signature():
    callbacks = pytest.importorskip("diffusers.callbacks")
    with sparge.dense_steps(1) as on_step_end:
        wanted = list(inspect.signature(callbacks.PipelineCallback.__call__).parameters)
        assert list(inspect.signature(on_step_end).parameters) == wanted[1:]


def test_a_pipeline_in_another_task_leaves_nothing_dense_behind():
    pipe = Pipeline()

    async def main() -> list[bool]:
        with sparge.dense_steps(2) as on_step_end:
            steps = await asyncio.to_thread(pipe, on_step_end)
        assert context.in_force(SPARSE).enabled
        return steps

    assert asyncio.run(main()) == [False, False, True, True, True, True]
    assert context.in_force(SPARSE).enabled
