"""The table of a report: at most 100 columns, repeated layers in one row, colours only where they are shown."""

import io
import re

import pytest
from rich.console import Console

from sparge_compile import SiteReport
from sparge_compile.report import Report
from sparge_compile.report_groups import grouped

LONG = "transformer.down_blocks.0.attentions.1.transformer_blocks.7.self_attention.processor.inner_attention"


def site(name, **facts):
    sizes = {"q_len": 8192, "k_len": 8192, "heads": 24, "head_dim": 128, "dtype": "bfloat16", "is_causal": False}
    chosen = {"threshold_source": "rule full", "density": 0.5, "dense_ms": 10.0, "sparse_ms": 4.0}
    return SiteReport(name, rewritten=True, reason=None, **{**sizes, **chosen, **facts})


def dense(name, reason="40 queries and 40 keys, min_tokens is 1024: it does not pay", **facts):
    return SiteReport(name, rewritten=False, reason=reason, q_len=40, k_len=40, dense_ms=1.0, **facts)


def names(*sites):
    return [group.label for group in grouped(sites, lambda one: one.density)]


def flat(text):
    return " ".join(text.split())


WIDE = [
    site(LONG, q_len="131072*s53 + 128*s27 + 1", k_len=131072, heads=128, head_dim=256, density=0.1),
    site("x" * 200, is_causal=True, threshold_source="attached profile", dtype="float8_e4m3fn"),
    dense("blocks.0", reason="a reason of one word, " + "y" * 150, pattern="not_attention", source="z" * 120),
    dense("[red]blocks[/red].1:smile:", reason="[bold]not markup[/bold]"),
]


@pytest.mark.parametrize("sites", [WIDE, WIDE[:1], WIDE[2:], []], ids=["all", "one", "dense", "none"])
def test_no_line_is_longer_than_100_columns(sites):
    text = str(Report(tuple(sites), notes=("a note " * 40,)))
    assert max(map(len, text.splitlines())) <= 100


def test_what_is_shown_is_all_there_and_nothing_is_markup():
    text = str(Report(tuple(WIDE)))
    assert "[bold]not markup[/bold]" in text and "[red]blocks[/red].1:smile:" in text
    assert all(part in text for part in LONG.split("."))  # in several lines, but whole
    assert "y" * 150 in "".join(text.split()) and "(not attention)" in flat(text)


def test_equal_layers_are_one_row_with_the_range_of_their_densities():
    sites = [site(f"blocks.{i}.attn1", density=0.2 + i / 100, sparse_ms=2.0 + i) for i in range(28)]
    text = str(Report(tuple(sites)))
    (row,) = [line for line in text.splitlines() if line.startswith("blocks")]
    assert row.split()[:2] == ["blocks.{0-27}.attn1", "x28"] and "0.200-0.470" in row
    assert row.endswith("0.34-5.0") and "8192 x 8192" in row and "24 x 128" in row and "bf16" in row


@pytest.mark.parametrize(
    "change",
    [{"q_len": 4096}, {"dtype": "float16"}, {"masked": True}, {"threshold_source": "profile"}, {"pattern": "mha"}],
    ids=lambda change: next(iter(change)),
)
def test_layers_that_differ_in_what_is_shown_are_rows_of_their_own(change):
    text = str(Report((site("blocks.0.attn"), site("blocks.1.attn", **change), site("blocks.2.attn"))))
    assert "blocks.{0,2}.attn x2" in text and "blocks.1.attn" in text


def test_a_name_stands_for_every_combination_of_its_numbers_and_for_nothing_else():
    square = [site(f"down.{i}.at.{j}.attn") for i in (0, 1) for j in (0, 1, 2)]
    assert names(*square) == ["down.{0-1}.at.{0-2}.attn x6"]
    assert names(*square[:-1]) == ["down.0.at.{0-2}.attn x3", "down.1.at.{0-1}.attn x2"]
    assert names(site("blocks.0.attn1"), site("blocks.0.attn2")) == ["blocks.0.attn1", "blocks.0.attn2"]
    assert names(site("attn:1"), site("attn:2"), site("7"), site("8")) == ["attn:{1-2} x2", "{7-8} x2"]
    assert names(*(site(f"a.{i}") for i in (0, 1, 2, 5, 7, 8))) == ["a.{0-2,5,7-8} x6"]


def test_groups_keep_the_order_of_their_first_sites():
    assert names(site("b.0"), site("a.0"), site("b.1"), site("a.1", density=0.1)) == ["b.{0-1} x2", "a.0", "a.1"]


def test_the_gain_is_said_in_words_and_so_is_a_loss():
    gain = Report((site("a"), dense("b")))
    assert gain.speedup == pytest.approx(11 / 5)
    assert "attention part: 2.2 times as fast as dense (5 instead of 11 ms), measured on this run's tensors" in str(
        gain
    )
    loss = Report((site("a", sparse_ms=20.0), site("b", sparse_ms=11.0)))
    assert loss.speedup == pytest.approx(20 / 31)
    assert "slower, 0.65 times as fast as dense" in str(loss) and "such as a in Policy.dense" in flat(str(loss))


def test_what_was_not_timed_counts_nowhere_and_is_said():
    untimed = site("b", dense_ms=None, sparse_ms=None)
    report = Report((site("a"), untimed, dense("c")))
    assert report.speedup == pytest.approx(11 / 5) and "1 of 3 calls not timed" in flat(str(report))
    assert Report((untimed,)).speedup is None and "attention part" not in str(Report((untimed,)))
    assert Report().speedup is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_are_for_terminals_and_heed_no_color(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    report = Report((site("a"), dense("b"), site("c", sparse_ms=20.0)))
    terminal, pipe, colourless = Terminal(), io.StringIO(), Terminal()
    report.show(terminal)
    report.show(pipe)
    monkeypatch.setenv("NO_COLOR", "1")
    report.show(colourless)
    assert all(f"\x1b[{colour}m" in terminal.getvalue() for colour in (31, 32, 33))  # a loss, a gain, dense
    assert "\x1b[3" not in colourless.getvalue()
    assert pipe.getvalue() == str(report) + "\n"
    without = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert [line.rstrip() for line in without.splitlines()] == str(report).splitlines()


def test_show_prints_to_the_standard_output(capsys):
    report = Report((site("a"),))
    report.show()
    assert capsys.readouterr().out == str(report) + "\n"


@pytest.mark.parametrize("width", [40, 60, 80])
def test_narrow_consoles_get_fewer_columns(width):
    text = io.StringIO()
    Console(file=text, width=width).print(Report((site(LONG), dense("b"))))
    assert max(len(line.rstrip()) for line in text.getvalue().splitlines()) <= width
    assert "density" in text.getvalue() and "0.500" in text.getvalue()
