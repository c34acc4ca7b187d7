"""The entry point `sparge`: find attention, claim, choose thresholds, rewrite, hand the graph to Inductor."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import fx

from sparge_compile import context, dynamo, graph_diff
from sparge_compile.claim import claim
from sparge_compile.graph import blocker, written_nodes
from sparge_compile.inductor import KEEPS_PASS_OFF, misread_by_attention_pass
from sparge_compile.logs import log, log_graph
from sparge_compile.markers import Marker, tables_of, take_markers, with_table
from sparge_compile.matchers import find_sites
from sparge_compile.policy import Policy, replace, split_options
from sparge_compile.proof import prove
from sparge_compile.report import LAST, SiteReport
from sparge_compile.report_sites import describe
from sparge_compile.rewrite import rewrite
from sparge_compile.site import AttentionSite, Claim, Decision, Refusal, StrictPolicyError
from sparge_compile.thresholds import decide


def sparge(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of `torch.compile(model, backend="sparge")`; TorchDynamo calls it once per graph and variant.

    Args:
        gm: the TorchDynamo graph.
        example_inputs: its fake inputs.
        mode: Inductor's, unchanged.
        options: keys `sparge.<field>` set Policy fields for this compile; the rest is Inductor's, unchanged.

    Raises:
        ValueError, TypeError: an unknown `sparge.` key, or a policy value out of range.
        RuntimeError: an option or mode that Inductor does not know.
        StrictPolicyError: the policy is strict and an attention call cannot be rewritten.
        ProfileError: the policy's profile was made for another model.
    """
    base, inductor_options = split_options(options)
    misread = misread_by_attention_pass(gm)
    reports = transform(gm, base)
    LAST.add(dynamo.compile_owner(), reports)
    if misread and dynamo.is_compiling_frame():
        context.guard_on_policy_in_force(base)  # there may be no site to have brought the guard
    if misread and context.in_force(base).enabled:
        inductor_options = {**KEEPS_PASS_OFF, **inductor_options}
    return dynamo.compile_with_inductor(gm, example_inputs, mode, inductor_options)


def transform(gm: fx.GraphModule, base: Policy) -> list[SiteReport]:
    """Rewrites `gm` in place under the policy in force and says what was done; without attention it does nothing.

    Args:
        gm: a TorchDynamo graph.
        base: the policy of the compile, before the contexts around it.
    """
    return [report for _, report in transform_sites(gm, base)]


def transform_sites(gm: fx.GraphModule, base: Policy) -> list[tuple[AttentionSite, SiteReport]]:
    """`transform`, with the site of each report. The nodes of those that stay dense are still in the graph."""
    started = time.perf_counter()
    before = graph_diff.readable(gm) if graph_diff.is_wanted() else None
    policy, outcomes = decide_sites(gm, base, take_markers(gm))
    if not outcomes:
        log.debug("no attention call in a graph of %d nodes", len(gm.graph.nodes))
        return []
    variant = _variant()
    reports = [describe(site, outcome, variant) for site, outcome in outcomes]
    _check_strict(policy, reports)
    rewrite(gm, [outcome for _, outcome in outcomes if isinstance(outcome, Decision)])
    log_graph(reports, time.perf_counter() - started)
    if before is not None:
        graph_diff.log_difference(before, graph_diff.readable(gm))
    _warn_if_all_dense(policy, reports)
    return [(site, report) for (site, _), report in zip(outcomes, reports, strict=True)]


def decide_sites(
    gm: fx.GraphModule, base: Policy, markers: Sequence[Marker] | None = None
) -> tuple[Policy, list[tuple[AttentionSite, Decision | Refusal]]]:
    """(the policy in force, each attention call of `gm` and what is decided about it). Edits nothing.

    A graph with attention is guarded on the policy and on what the decisions depend on. Without `markers` what is
    attached to the modules has no part in them.

    Raises:
        ProfileError: the policy's profile was made for another model than the one being compiled.
    """
    sites = find_sites(gm)
    policy = context.in_force(base)
    if not sites:
        return policy, []
    if dynamo.is_compiling_frame():
        context.guard_on_policy_in_force(base)
        if policy.enabled:
            context.guard_on_what_is_reserved()
        _warn_before_recompile_limit()
        _check_profile(policy)
    return policy, list(zip(sites, _decide_all(gm, sites, policy, markers), strict=True))


def _check_profile(policy: Policy) -> None:
    module = dynamo.compiled_module()
    if policy.enabled and policy.profile is not None and module is not None:
        policy.profile.check_model(module)
        policy.profile.warn_of_missing_sites(module)


def _decide_all(
    gm: fx.GraphModule,
    sites: Sequence[AttentionSite],
    policy: Policy,
    markers: Sequence[Marker] | None,
) -> list[Decision | Refusal]:
    if not policy.enabled:
        return [Refusal("rewriting is off (enabled=False)", requested=True) for _ in sites]
    blocked = context.STATE.reserved or blocker(gm.graph)
    if blocked:
        return [Refusal(site.unmatched or blocked) for site in sites]
    written = written_nodes(gm.graph)
    tables = {} if markers is None else tables_of(sites, markers)
    known: dict[Hashable, str | None] = {}
    return [_decide(site, policy, written, tables.get(site.node), known) for site in sites]


def _decide(
    site: AttentionSite,
    policy: Policy,
    written: set[fx.Node],
    table: Marker | Refusal | None,
    known: dict[Hashable, str | None],
) -> Decision | Refusal:
    claimed = claim(site, policy, written)
    if not isinstance(claimed, Claim):
        return claimed
    if isinstance(table, Refusal):
        return table
    # What is attached wins over any profile.
    outcome = decide(claimed, policy if table is None else replace(policy, {"profile": None}))
    if table is not None and isinstance(outcome, Decision):
        outcome = with_table(outcome, table)
    if isinstance(outcome, Decision) and site.several_nodes:
        return prove(outcome, known) or outcome
    return outcome


def _check_strict(policy: Policy, reports: Sequence[SiteReport]) -> None:
    refused = [report for report in reports if not report.rewritten and not report.requested]
    if policy.strict and refused:
        lines = "\n".join(f"  {report.name} ({report.source}): {report.reason}" for report in refused)
        raise StrictPolicyError(
            f"strict=True, and {len(refused)} of {len(reports)} attention calls cannot be rewritten:\n{lines}\n"
            "Name them in Policy.dense, or drop strict."
        )


def _warn_if_all_dense(policy: Policy, reports: Sequence[SiteReport]) -> None:
    """A graph in which nothing was rewritten is said out loud."""
    if policy.enabled and not any(report.rewritten or report.requested for report in reports):
        reasons = sorted({report.reason or "" for report in reports})
        warnings.warn(
            f"sparge: none of {len(reports)} attention calls in this graph was rewritten; it runs dense.\n  "
            + "\n  ".join(reasons)
            + "\nprint(sparge_compile.last_report()) lists every call.",
            stacklevel=2,
        )


def _variant() -> int | None:
    """Which variant of its code object is being compiled, from 1."""
    code = dynamo.code_being_compiled()
    return None if code is None else dynamo.variants_compiled(code) + 1


def _warn_before_recompile_limit() -> None:
    """Past its recompile limit TorchDynamo runs the model eagerly and silently; say so one variant earlier."""
    code = dynamo.code_being_compiled()
    if code is None or dynamo.variants_compiled(code) + 1 != dynamo.recompile_limit():
        return
    warnings.warn(
        f"sparge: this is variant {dynamo.recompile_limit()} of {code.co_name} ({code.co_filename}:"
        f"{code.co_firstlineno}), torch's recompile limit. Under one more policy or shape it will run eagerly, without "
        "Inductor and without sparse attention. Use fewer policies and lengths, or raise "
        "torch.compiler.config.recompile_limit.",
        stacklevel=2,
    )
