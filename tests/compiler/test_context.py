"""`rewriting`: one compile per policy, cached; scoped to its thread, its task and its block."""

import asyncio
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from light import EXACT_FIELDS, LightBackend

import sparge_compile as sparge
from sparge_compile import Policy, context
from sparge_compile.policy import split_options
from sparge_compile.rules import break_even, rule_for

FULL = rule_for("auto", is_causal=False).thresholds
X = torch.randn(1, 2, 6, 8)


def attention(x):
    return F.scaled_dot_product_attention(x, x, x)


@pytest.fixture
def compiled():
    """A compiled attention function; `compiled.backend` counts its compiles."""
    backend = LightBackend(Policy(min_tokens=0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        function = torch.compile(attention, backend=backend)
        function.backend = backend
        yield function


def topk_of(node):
    return node.kwargs["thresholds"][0]


def test_each_policy_is_compiled_once_and_toggling_is_cached(compiled):
    for _ in range(3):
        compiled(X)
        with sparge.rewriting(topk=0.3):
            compiled(X)
        with sparge.rewriting(enabled=False):
            assert torch.equal(compiled(X), attention(X))
    assert compiled.backend.compiles == 3
    assert compiled.backend.rewritten == [True, True, False]


def test_equal_policies_share_one_variant_however_written(compiled):
    options, _ = split_options({"sparge.topk": 0.3, "sparge.min_tokens": 0})
    for entered in (
        sparge.rewriting(topk=0.3),
        sparge.rewriting(Policy(topk=0.3, min_tokens=0)),
        sparge.rewriting(Policy(min_tokens=0), topk=0.3),
        sparge.rewriting(options),
        sparge.rewriting(topk=0.3, dense=[]),
    ):
        with entered:
            compiled(X)
    assert compiled.backend.compiles == 1


def test_a_compiles_own_options_equal_to_a_context_share_its_variant():
    backend = LightBackend(Policy(topk=0.3, min_tokens=0))
    function = torch.compile(attention, backend=backend)
    with torch.no_grad():
        function(X)
        with sparge.rewriting(Policy(topk=0.3, min_tokens=0)):
            function(X)
    assert backend.compiles == 1


def test_all_disabled_policies_share_one_variant(compiled):
    for fields in ({}, {"topk": 0.3}, {"strict": True}, {"dense": ("x",)}):
        with sparge.rewriting(enabled=False, **fields):
            compiled(X)
    assert compiled.backend.compiles == 1


def test_contexts_nest_fields_change_and_policies_replace(compiled):
    with sparge.rewriting(topk=0.3):
        with sparge.rewriting(similarity_threshold=0.5):
            compiled(X)
        with sparge.rewriting(Policy(min_tokens=0)):
            compiled(X)
        compiled(X)
    seen = [tuple(node.kwargs["thresholds"][0:3:2]) for node in compiled.backend.operators()]
    assert seen == [(0.3, 0.5), (0.0, FULL.similarity), (0.3, FULL.similarity)]


def test_a_policy_without_min_tokens_brings_the_break_even_back(compiled):
    with sparge.rewriting(Policy()):
        compiled(X)
    assert f"min_tokens is {break_even(X.device, 'auto')}" in compiled.backend.reason


@pytest.mark.never_wrong(16, "compiled")
def test_an_exception_restores_the_policy(compiled):
    compiled(X)
    with pytest.raises(KeyError), sparge.rewriting(topk=0.3), sparge.rewriting(enabled=False):
        raise KeyError
    compiled(X)
    assert compiled.backend.compiles == 1 and context.in_force(Policy()) == Policy()


def test_one_context_object_may_be_entered_again_inside_itself(compiled):
    once = sparge.rewriting(topk=0.3)
    with once:
        with once:
            compiled(X)
        assert context.in_force(Policy()).topk == 0.3
    assert context.in_force(Policy()).topk is None


def test_decorators_hold_the_policy_for_the_call(compiled):
    @sparge.rewriting(topk=0.3)
    def call(x, *, twice):
        """Doc."""
        return compiled(x) * (2 if twice else 1)

    @sparge.rewriting(topk=0.4)
    async def call_async(x):
        await asyncio.sleep(0)
        return compiled(x)

    call(X, twice=True)
    asyncio.run(call_async(X))
    assert [topk_of(node) for node in compiled.backend.operators()] == [0.3, 0.4]
    assert call.__name__ == "call" and call.__doc__ == "Doc." and asyncio.iscoroutinefunction(call_async)
    assert context.in_force(Policy()) == Policy()


def generator():
    yield 1


async def async_generator():
    yield 1


@pytest.mark.parametrize("function", [generator, async_generator], ids=["generator", "async-generator"])
def test_decorating_a_generator_is_refused(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}.*outside the context"):
        sparge.rewriting(topk=0.3)(function)


@pytest.mark.never_wrong(16, "compiled")
def test_a_policy_in_one_thread_never_shows_in_another(compiled):
    inside, done, results = threading.Event(), threading.Event(), []

    def other():
        inside.wait(30)
        with torch.no_grad():
            results.append((context.in_force(Policy()).topk, compiled(X)))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with sparge.rewriting(topk=0.3):
        compiled(X)
        inside.set()
        assert done.wait(60)
    thread.join()
    assert results[0][0] is None
    assert [topk_of(node) for node in compiled.backend.operators()] == [0.3, 0.0]


@pytest.mark.never_wrong(16, "compiled")
def test_a_policy_in_one_task_never_shows_in_another(compiled):
    async def task(topk, seen):
        with sparge.rewriting(topk=topk):
            for _ in range(3):
                await asyncio.sleep(0)
                compiled(X)
                seen.append(context.in_force(Policy()).topk)

    async def both():
        first, second = [], []
        await asyncio.gather(task(0.3, first), task(0.6, second))
        return first, second

    assert asyncio.run(both()) == ([0.3] * 3, [0.6] * 3)
    assert sorted(topk_of(node) for node in compiled.backend.operators()) == [0.3, 0.6]


@pytest.mark.never_wrong(16, "compiled")
def test_leaving_a_context_out_of_order_never_undoes_another():
    def suspended():
        with sparge.rewriting(topk=0.3):
            yield

    paused = suspended()
    next(paused)
    with sparge.rewriting(enabled=False):
        paused.close()
        assert context.in_force(Policy()).enabled is False
    assert context.in_force(Policy()) == Policy()


def test_functions_without_attention_never_recompile():
    backend = LightBackend()
    function = torch.compile(lambda x: x.relu() + 1, backend=backend)
    function(X)
    for fields in ({"topk": 0.3}, {"enabled": False}, {"strict": True}):
        with sparge.rewriting(**fields):
            function(X)
    assert backend.compiles == 1


class Entered:
    prebuilt = sparge.rewriting(topk=0.3)

    @staticmethod
    def constructed(x):
        with sparge.rewriting(topk=0.3):
            return attention(x)

    @staticmethod
    def built_before(x):
        with Entered.prebuilt:
            return attention(x)

    @staticmethod
    @sparge.rewriting(topk=0.3)
    def decorated(x):
        return attention(x)

    @staticmethod
    def by_hand(x):
        Entered.prebuilt.__enter__()
        out = attention(x)
        Entered.prebuilt.__exit__(None, None, None)
        return out


@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks-allowed", "fullgraph"])
@pytest.mark.parametrize(
    ("how", "said"), [("constructed", "enter it around the compiled model"), ("by_hand", "rewriting")]
)
def test_entering_inside_compiled_code_is_an_error_that_says_what_to_do(how, said, fullgraph):
    inside = getattr(Entered, how)
    with torch.no_grad(), pytest.raises(Exception, match=said):
        torch.compile(lambda x: inside(x + 1), backend=LightBackend(), fullgraph=fullgraph)(X)
    assert context.in_force(Policy()) == Policy()


def test_dense_steps_inside_compiled_code_is_the_same_error():
    def steps(x):
        with sparge.dense_steps(1):
            return attention(x)

    with torch.no_grad(), pytest.raises(Exception, match="enter it around the compiled model"):
        torch.compile(steps, backend=LightBackend())(X)


def test_code_that_torch_skips_inside_a_compiled_call_may_enter_it():
    @torch.compiler.disable(recursive=False)
    def skipped(x):
        with sparge.rewriting(topk=0.3):
            return inner(x)

    backend = LightBackend()
    inner = torch.compile(attention, backend=backend)
    with torch.no_grad():
        torch.compile(lambda x: skipped(x + 1), backend=LightBackend())(X)
    assert [node.kwargs["thresholds"][0] for node in backend.operators()] == [0.3]


@pytest.mark.parametrize("how", ["built_before", "decorated"])
def test_entering_what_was_built_outside_breaks_the_graph_and_holds_inside(how):
    inside, backend = getattr(Entered, how), LightBackend()
    with torch.no_grad():
        torch.compile(lambda x: inside(x + 1), backend=backend)(X)
    (node,) = backend.operators()
    assert node.kwargs["thresholds"][0] == 0.3
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match=r"rewriting|context manager"):
        torch.compile(lambda x: inside(x + 1), backend=LightBackend(), fullgraph=True)(X)


def recompile_warnings(compiled, calls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for topk, x in calls:
            with sparge.rewriting(topk=topk):
                compiled(x)
    return [str(warning.message) for warning in caught if "recompile limit" in str(warning.message)]


def test_the_last_policy_that_fits_comes_with_a_warning_and_is_still_rewritten(compiled):
    with torch._dynamo.config.patch(recompile_limit=3):
        early = recompile_warnings(compiled, [(0.1, X), (0.2, X), (0.1, X)])
        last = recompile_warnings(compiled, [(0.3, X), (0.3, X)])
    assert early == [] and len(last) == 1 and "attention" in last[0]
    assert compiled.backend.rewritten == [True] * 3


def test_variants_by_length_count_towards_the_warning(compiled):
    calls = [(topk, torch.randn(1, 2, length, 8)) for length in (4, 6) for topk in (0.1, 0.2)]
    compiled = torch.compile(attention, backend=compiled.backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=4):
        assert len(recompile_warnings(compiled, calls)) == 1


def test_the_policy_reaches_the_operator(compiled):
    with sparge.rewriting(**EXACT_FIELDS):
        torch.testing.assert_close(compiled(X), attention(X), rtol=1e-4, atol=1e-5)
    (node,) = compiled.backend.operators()
    assert node.kwargs["precision"] == "none" and node.kwargs["thresholds"] == [0.0, 1.0, 1.0, -1e30]
