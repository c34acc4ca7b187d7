"""One canary per function of sparge_compile/dynamo.py: each fails when torch moves a private name, and says which."""

import inspect

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from light import Attention
from torch import nn

from sparge_compile import context, dynamo
from sparge_compile.policy import Policy

X = torch.randn(2, 2, 6, 8)


def inside_a_compile(look, *args, function=None, **compile_options):
    """What `look(gm)` returns when called inside a backend; the compile runs `function` on `args`."""
    seen = []

    def backend(gm, _):
        seen.append(look(gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(
            function or (lambda x: F.scaled_dot_product_attention(x, x, x)), backend=backend, **compile_options
        )(*(args or (X,)))
    return seen[0]


def attention_node(gm):
    (node,) = [n for n in gm.graph.nodes if n.target is F.scaled_dot_product_attention]
    return node


def test_an_attribute_guard_recompiles_when_the_attribute_changes_and_only_then():
    compiles = []

    def backend(gm, _):
        compiles.append(1)
        dynamo.install_attribute_guard(__name__, "Holder", "token")
        return gm.forward

    function = torch.compile(lambda x: x + 1, backend=backend)
    for token in ("a", "a", "b", "a"):
        Holder.token = token
        function(X)
    assert len(compiles) == 2, "InstructionTranslator.current_tx().import_source, AttrSource or EQUALS_MATCH changed"


class Holder:
    token = "a"


def test_the_frame_being_compiled_is_known_inside_a_backend_and_nowhere_else():
    def function(x):
        return x + 1

    assert dynamo.is_compiling_frame() is False
    assert dynamo.compile_owner() is None and dynamo.code_being_compiled() is None and dynamo.root_module(None) is None
    looked = inside_a_compile(
        lambda _: (dynamo.is_compiling_frame(), dynamo.compile_owner(), dynamo.code_being_compiled()), function=function
    )
    assert looked[0] is True, "InstructionTranslator.current_tx or TracingContext.try_get changed"
    assert looked[1] is not None, "output.compiler_fn moved"
    assert looked[2] is function.__code__, "output.root_tx.f_code moved"


def test_each_call_of_torch_compile_has_its_own_owner():
    owners = [inside_a_compile(lambda _: dynamo.compile_owner()) for _ in range(2)]
    assert owners[0] is not owners[1]


def test_the_root_module_is_the_one_whose_forward_is_compiled():
    model = Attention()
    root = inside_a_compile(lambda _: dynamo.root_module(None), torch.randn(1, 4, 16), function=model)
    assert root is model, "output.local_scope or root_tx changed"
    assert inside_a_compile(lambda _: dynamo.root_module(None)) is None


OPTIONS = {"sparge.topk": 0.3}


def compiled_forms():
    module, in_place = Attention(), Attention()
    in_place.compile(backend="sparge", options=OPTIONS)
    return {
        "module": (torch.compile(module, backend="sparge", options=OPTIONS), module),
        "in-place": (in_place, in_place),
        "function": (torch.compile(attention_of, backend="sparge", options=OPTIONS), attention_of),
    }


def attention_of(x):
    return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("form", ["module", "in-place", "function"])
def test_what_was_compiled_and_with_which_options_can_be_read_back(form):
    compiled, original = compiled_forms()[form]
    assert dynamo.uncompiled(compiled) == (original, OPTIONS), "_orig_mod, dynamo_ctx.callback or its kwargs moved"
    assert dynamo.is_compiled(compiled), "_orig_mod, _compiled_call_impl or _torchdynamo_orig_callable moved"
    assert form == "function" or dynamo.is_compiled(nn.Sequential(compiled))


@pytest.mark.parametrize("model", [Attention(), attention_of], ids=["module", "function"])
def test_what_was_never_compiled_has_no_options(model):
    assert dynamo.uncompiled(model) == (model, None) and not dynamo.is_compiled(model)


def test_a_compile_in_place_is_undone_inside_the_context_and_back_after():
    model = Attention()
    model.compile(backend="eager")
    before = model._compiled_call_impl
    with pytest.raises(KeyError), dynamo.not_compiled_in_place(model):
        assert model._compiled_call_impl is None
        raise KeyError
    assert before is not None and model._compiled_call_impl is before


def test_the_recompile_limit_is_torchs():
    assert dynamo.recompile_limit() == torch._dynamo.config.recompile_limit


def test_compiling_aside_meets_no_limit_and_leaves_torchs_settings():
    before = (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit)
    compiled = []

    def function(x):
        return x + 1

    for _ in range(before[0] + 2):

        def backend(gm, _):
            compiled.append(gm)
            return gm.forward

        with dynamo.aside(function, backend) as aside:
            aside(torch.ones(2))
    assert len(compiled) == before[0] + 2
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit) == before


def test_listeners_hear_the_start_and_the_end_of_each_compile_even_a_failing_one():
    heard = []

    def failing(gm, _):
        raise ValueError("broken backend")

    with dynamo.compile_listeners(lambda: heard.append("start"), lambda: heard.append("end")):
        inside_a_compile(lambda _: heard.append("backend"))
        with pytest.raises(Exception, match="broken backend"):
            torch.compile(lambda x: x * 3, backend=failing)(X)
    inside_a_compile(lambda _: None, function=lambda x: x - 2)
    assert heard == ["start", "backend", "end", "start", "end"], "callback_handler changed"


def test_facts_about_sizes_are_known_guarded_or_left_to_run_time():
    def look(gm):
        length = attention_node(gm).args[0].meta["example_value"].shape[2]
        known = (dynamo.known(length >= 2), dynamo.known(length >= 20), dynamo.known(4 == 4))
        guarded = (dynamo.guard(length >= 20), dynamo.guard(length >= 2), dynamo.guard(3 > 4))
        return known, guarded, dynamo.hint(length), dynamo.hint(7), dynamo.specialize(length), dynamo.specialize(7)

    x = torch.randn(1, 2, 11, 8)
    torch._dynamo.maybe_mark_dynamic(x, 2)
    assert inside_a_compile(look, x) == ((True, False, True), (False, True, False), 11, 7, 11, 7)


def test_a_size_bounded_by_the_caller_is_never_guarded():
    def look(gm):
        length = attention_node(gm).args[0].meta["example_value"].shape[2]
        asked = [dynamo.guard(length >= n) for n in (4, 20, 1000)]
        return asked, dynamo.specialize(length), dynamo.hint(length)

    x = torch.randn(1, 2, 11, 8)
    torch._dynamo.mark_dynamic(x, 2, min=5, max=100)
    found = inside_a_compile(look, x)
    assert found == ([True, None, False], None, 11), "tracked_fakes' symbolic_context.constraint_sizes changed"


def test_a_symbolic_number_is_specialized_to_a_plain_one():
    def look(gm):
        return [dynamo.specialize(value) for value in attention_node(gm).args[0].meta["example_value"].shape]

    sizes = inside_a_compile(look, X, dynamic=True)
    assert sizes == [2, 2, 6, 8] and all(type(size) is int for size in sizes)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)], ids=str)
def test_the_physical_layout_is_what_empty_permuted_takes(order):
    x = torch.empty_permuted((2, 3, 4, 5), order)
    assert dynamo.physical_layout(x) == order


def test_a_node_knows_its_module_its_line_and_its_value():
    model = nn.Sequential(Attention())

    def look(gm):
        node = attention_node(gm)
        return (
            dynamo.module_path(node),
            dynamo.user_frame(node),
            dynamo.example(node),
            dynamo.is_plain(dynamo.example(node)),
        )

    path, frame, value, plain = inside_a_compile(look, torch.randn(1, 4, 16), function=model)
    assert path[1] == "Attention" and "0" in path[0], "node.meta['nn_module_stack'] changed"
    assert frame[0] == inspect.getsourcefile(Attention) and frame[2] == "forward", "node.meta['stack_trace'] changed"
    assert tuple(value.shape) == (1, 2, 4, 8) and plain, "node.meta['example_value'] changed"


def test_plain_tensors_are_told_from_other_kinds():
    assert not dynamo.is_plain(torch.ones(2)), "a real tensor is not of the graph"
    assert not dynamo.is_plain(torch.ones(2).to_sparse())


def test_an_example_value_can_be_recorded():
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    assert dynamo.example(node) is None
    dynamo.set_example(node, 3)
    assert dynamo.example(node) == 3


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [("no-such-mode", None, "no-such-mode"), (None, {"no_such_option": 1}, "no_such_option")],
    ids=["mode", "option"],
)
def test_inductor_checks_mode_and_options(mode, options, message):
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(RuntimeError, match=message):
        dynamo.compile_with_inductor(gm, [X], mode, options)


def test_the_policy_guard_reads_the_token_of_the_policy_in_force():
    inside_a_compile(lambda _: context.guard_on_policy_in_force(Policy(topk=0.125)))
    tokens = [value.token for name, value in vars(context.STATE).items() if name.startswith("base_")]
    assert Policy(topk=0.125).token in tokens


def test_forward_mode_and_transforms_are_seen_and_a_guard_asks_for_forward_mode():
    seen, compiles = [], []

    def backend(gm, _):
        compiles.append(gm)
        return gm.forward

    def function(x):
        return x * (2 if dynamo.is_forward_mode() else 1)

    compiled = torch.compile(function, backend=backend)
    torch.vmap(lambda x: seen.append((dynamo.is_forward_mode(), dynamo.is_transforming())) or x)(X)
    for _ in range(2):
        assert torch.equal(compiled(X), X)
        with forward_ad.dual_level():
            seen.append((dynamo.is_forward_mode(), dynamo.is_transforming()))
            assert torch.equal(compiled(X), X * 2), "TorchDynamo no longer guards on forward_ad._current_level"
    assert seen == [(False, True), (True, True), (True, True)] and not dynamo.is_transforming()
    assert len(compiles) == 2


def test_the_kinds_of_operators_are_told_apart():
    assert isinstance(torch.ops.aten.add.Tensor, dynamo.Operator)
    assert isinstance(torch.ops.aten.add, dynamo.OperatorPacket)
    assert isinstance(torch.ops.higher_order.cond, dynamo.HigherOrderOperator)


def test_the_fused_attention_calls_of_torch_exist():
    assert callable(dynamo.FUSED_ENCODER_LAYER) and callable(dynamo.FUSED_MULTI_HEAD_ATTENTION)


def test_code_traced_for_a_backend_is_told_from_code_that_runs_or_is_exported():
    class Model(nn.Module):
        def forward(self, x):
            return x * (2 if dynamo.is_traced_for_a_backend() else 1)

    model = Model()
    assert torch.equal(model(X), X)
    assert torch.equal(torch.compile(model, backend="eager")(X), X * 2), "torch.compiler.is_dynamo_compiling changed"
    exported = torch.export.export(model, (X,), strict=True).module()
    assert torch.equal(exported(X), X), "torch.compiler._is_exporting_flag moved"


def test_a_module_in_a_local_variable_is_found_by_its_name_and_path():
    model = nn.Sequential(Attention())

    def look(gm):
        path = dynamo.module_path(attention_node(gm))[0]
        start = dynamo.root_local(path)
        found = [dynamo.module_in_local(start, "0"), dynamo.module_in_local(start, "1")]
        return found, dynamo.module_in_local("no_such_local", "0"), start

    found, none, start = inside_a_compile(look, torch.randn(1, 4, 16), function=model)
    assert found == [model[0], None] and none is None, f"output.local_scope changed, or the path of {start}"
    assert inside_a_compile(lambda _: dynamo.root_local(None), torch.randn(1, 4, 16), function=model[0]) == "self"
    assert dynamo.root_local(None) is None


@pytest.mark.parametrize("name", ["self", ""], ids=["one-local", "every-local"])
def test_a_guard_on_an_attribute_of_a_module_asks_each_module_that_comes(name):
    answers = []

    def backend(gm, _):
        answers.append(dynamo.guard_on_attribute_of_local(name, "_sparge_test"))
        return gm.forward

    marked, plain = Attention(), Attention()
    marked.__dict__["_sparge_test"] = "yes"
    for model in (marked, plain):
        model.compile(backend=backend)
    x = torch.randn(1, 4, 16)
    for _ in range(2):
        marked(x), plain(x)
    del marked.__dict__["_sparge_test"]
    marked(x)
    assert answers == [True, False], "LocalSource, NOT_PRESENT_IN_GENERIC_DICT or EQUALS_MATCH changed"


def test_what_is_forbidden_in_graphs_is_an_error_there():
    def forbidden(x):
        return x + 1

    dynamo.forbid_in_graphs(forbidden)
    with pytest.raises(Exception, match="forbidden"):
        torch.compile(lambda x: forbidden(x), backend="eager")(torch.ones(2))


def test_a_function_is_written_out_with_its_attention_as_one_node_under_the_graphs_autocast():
    def function(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.nn.functional.linear(x, x[0, 0])
        return F.scaled_dot_product_attention(x, x, x)

    def project(x):
        projected = F.linear(x, x[0, 0].clone().zero_())
        return F.scaled_dot_product_attention(projected, projected, projected, torch.ones(6, 6).tril().bool())

    def look(gm):
        node = next(n for n in gm.graph.nodes if n.target is F.linear)
        fakes = [dynamo.example(n) for n in gm.graph.nodes if n.op == "placeholder"]
        inner, outer = (dynamo.written_out(n, project, fakes) for n in (node, attention_node(gm)))
        return [
            [(str(n.target), dynamo.example(n).dtype) for n in module.graph.nodes if n.op == "call_function"]
            for module in (inner, outer)
        ]

    with torch.autocast("cpu", enabled=False):
        inner, outer = inside_a_compile(look, function=function)
    attention = "aten.scaled_dot_product_attention.default"
    assert (attention, torch.bfloat16) in inner, "_enter_autocast, or make_fx(pre_dispatch=True), changed"
    assert (attention, torch.float32) in outer, "_exit_autocast, or make_fx(pre_dispatch=True), changed"
    assert torch.is_autocast_cache_enabled()


def test_symbolic_sizes_are_evaluated_with_other_numbers():
    def look(gm):
        size = dynamo.example(attention_node(gm).args[0]).shape[2]
        ((symbol, at_hand),) = dynamo.symbols(size * 3).items()
        return at_hand, dynamo.evaluated(size * 3, {symbol: 5}), dynamo.evaluated(size * 0.5, {symbol: 5})

    x = torch.randn(2, 2, 6, 8)
    torch._dynamo.mark_dynamic(x, 2)
    assert inside_a_compile(look, x) == (6, 15, 2.5), "ShapeEnv.backed_var_to_val or SymNode.expr moved"


def test_real_tensors_are_real_inside_fake_modes_and_the_users_modes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"), FakeTensorMode(), dynamo.real_tensors():
        assert torch.ones(2, device="cpu").sum().item() == 2, "unset_fake_temporarily changed"
        assert torch.ones(2).device.type == "cpu", "torch._C.DisableTorchFunction changed"


def test_the_attention_kernels_and_their_order_are_those_torch_starts_with():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    assert dynamo.has_default_attention_kernels(), "torch._C._get_*_sdp_enabled or _get_sdp_priority_order changed"
    kernels = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for allowed, in_order in ((kernels[:3], False), (kernels, True)):
        with sdpa_kernel(allowed, set_priority=in_order):
            assert not dynamo.has_default_attention_kernels()
    assert dynamo.has_default_attention_kernels()


def test_the_fused_layers_activation_is_a_product_and_a_gelu():
    bias, x, weight = torch.randn(3), torch.randn(2, 4), torch.randn(4, 3)
    expected = F.gelu(x @ weight + bias)
    torch.testing.assert_close(dynamo.addmm_activation(bias, x, weight, use_gelu=True), expected)


def test_products_of_int8_are_exact():
    a, b = (torch.randint(-127, 128, (32, 32), dtype=torch.int8) for _ in range(2))
    assert torch.equal(dynamo.int8_matmul(a, b.T), a.int() @ b.int().T), "torch._int_mm changed"


@pytest.mark.parametrize("chosen", [True, False], ids=["chosen", "default"])
def test_the_cache_folder_is_inductors(monkeypatch, tmp_path, chosen):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if chosen:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert dynamo.inductor_cache_folder() == cache_dir(), "cache_dir_utils moved"
