"""Figures of a report show every site and head, and the tiles of a head; they draw without a display."""

import builtins
import itertools

import numpy as np
import pytest
import torch
from light import EXACT, EXACT_FIELDS, Stack
from matplotlib.backends.backend_agg import FigureCanvasAgg

import sparge_compile as sparge
from sparge_compile import Policy, SiteReport
from sparge_compile.report import Report

NAME = "transformer.transformer_blocks.{}.attn1"


def report_of(count, heads=24, dense=()):
    sites = []
    for i in range(count):
        facts = {"q_len": 8192, "k_len": 8192, "heads": heads, "head_dim": 64}
        if i in dense:
            reason = "77 queries and 77 keys, min_tokens is 1024: sparse attention does not pay on short calls"
            sites.append(SiteReport(NAME.format(i), rewritten=False, reason=reason, **facts))
            continue
        densities = tuple((i + head / heads) / count for head in range(heads))
        mean = sum(densities) / heads
        sites.append(SiteReport(NAME.format(i), True, None, density=mean, head_densities=densities, **facts))
    return Report(tuple(sites))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def drawn(figure):
    """Draws it; no text of the axes may stick out of the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, (width, height) = canvas.get_renderer(), canvas.get_width_height()
    for axes in figure.axes:
        box = axes.get_tightbbox(renderer)
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
    return figure


@pytest.mark.parametrize(("count", "heads"), [(1, 1), (1, 24), (9, 8), (100, 40)])
def test_the_heat_map_has_a_row_for_each_site_and_a_column_for_each_head(count, heads):
    figure = drawn(report_of(count, heads).plot())
    axes, bar = figure.axes
    (image,) = axes.get_images()
    values = np.asarray(image.get_array())
    assert values.shape == (count, heads) and image.get_clim() == (0.0, 1.0)
    assert values[-1, -1] == pytest.approx((count - 1 + (heads - 1) / heads) / count)
    assert [label.get_text() for label in axes.get_yticklabels()] == [NAME.format(i) for i in range(count)]
    assert "query head" in axes.get_xlabel() and "density" in bar.get_ylabel()


def test_letters_of_neighbouring_rows_do_not_overlap():
    figure = drawn(report_of(100).plot())
    renderer = figure.canvas.get_renderer()
    boxes = [label.get_window_extent(renderer) for label in figure.axes[0].get_yticklabels()]
    assert all(above.y0 >= below.y1 - 0.5 for above, below in itertools.pairwise(boxes))


def test_dense_sites_are_hatched_and_say_why():
    axes = drawn(report_of(4, dense=(1, 3)).plot()).axes[0]
    assert texts(axes) == ["dense: too short"] * 2
    assert [patch.get_hatch() for patch in axes.patches] == ["////"] * 2
    assert np.isnan(np.ma.filled(axes.get_images()[0].get_array(), np.nan)[[1, 3]]).all()


def test_sites_with_fewer_heads_leave_the_rest_of_their_row_empty():
    sites = (*report_of(1, heads=2).sites, *report_of(1, heads=5).sites)
    values = np.ma.filled(drawn(Report(sites).plot()).axes[0].get_images()[0].get_array(), np.nan)
    assert np.isnan(values[0, 2:]).all() and not np.isnan(values[1]).any()


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_tile_map_shows_what_was_computed(is_causal):
    x = torch.randn(1, 300, 16).cumsum(1) / 4
    policy = Policy(min_tokens=0, cdf_threshold=0.7)
    report = sparge.explain(Stack(1, is_causal=is_causal).eval(), x, policy=policy, timing=False, tile_maps=("*",))
    figure = drawn(report.plot("blocks.0", head=1))
    (axes,) = figure.axes
    shown = np.asarray(axes.get_images()[0].get_array())
    assert (shown == 2).tolist() == report.tile_map("blocks.0", 1).tolist()
    density = report.sites[0].head_densities[1]
    assert (shown == 2).sum() / (shown > 0).sum() == pytest.approx(density) and (shown == 0).any() == is_causal
    assert axes.get_images()[0].get_extent() == [0, 5 * 64, 3 * 128, 0]
    assert f"{density:.3f}" in axes.get_title() and "blocks.0" in axes.get_title()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["computed", "skipped", *(["in the future"] if is_causal else [])]


def test_what_cannot_be_plotted_says_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="explain"):
        Report().plot()
    policy = Policy(**{**EXACT_FIELDS, "dense": ("*",)})
    with pytest.raises(ValueError, match="explain"):
        sparge.explain(Stack(1).eval(), torch.randn(1, 6, 16), policy=policy).plot()
    report = sparge.explain(Stack(1).eval(), torch.randn(1, 6, 16), policy=EXACT)
    with pytest.raises(KeyError, match="tile_maps"):
        report.plot("blocks.0")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"sparge-compile\[plot\]"):
        report.plot()
