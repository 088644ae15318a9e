"""The parts of the page: escaping, number formats, and positions on an axis."""

from __future__ import annotations

import pytest

from colora.server.reporting.page.formats import count, duration, listed, number, rounds, signed, size
from colora.server.reporting.page.markup import Html, element, escape, table
from colora.server.reporting.page.plot import Series, dumbbell, line_chart, make_axis


def test_every_text_is_escaped_once() -> None:
    assert element("p", "a < b & c", title='"x"') == '<p title="&quot;x&quot;">a &lt; b &amp; c</p>'
    assert element("p", element("b", "<i>")) == "<p><b>&lt;i&gt;</b></p>"
    assert escape("a\u202eb\x00c") == "a b c", "no control characters, also none that change the direction of a text"
    assert element("svg", viewBox="0 0 1 1", aria_hidden="true", class_="x", hidden=None, open=True, lang=False) == (
        '<svg viewBox="0 0 1 1" aria-hidden="true" class="x" open></svg>'
    )


def test_a_cell_is_markup_only_if_it_is_made_as_such() -> None:
    made = table(["<td>"], [["<td>x</td>", Html("<td>y</td>")]], caption="<c>")
    assert '<th scope="col">&lt;td&gt;</th>' in made
    assert "&lt;td&gt;x&lt;/td&gt;</th><td>y</td>" in made


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.12345), "0.123"),
        (number(-0.5), "−0.500"),
        (number(-0.0001), "0.000"),
        (number(1234.5), "1234"),
        (number(None), "–"),
        (signed(0.1, 0.02), "+0.100 ± 0.020"),
        (signed(-0.1), "−0.100"),
        (size(999), "999 B"),
        (size(999.6), "1.00 kB"),
        (size(12_345_678), "12.3 MB"),
        (size(5e15), "5000 TB"),
        (duration(0.04), "0.0 s"),
        (duration(59.6), "60 s"),
        (duration(150), "2 min"),
        (duration(7260), "2 h 01 min"),
        (count(1, "site"), "1 site"),
        (count(1296, "row"), "1,296 rows"),
        (count(2, "reply"), "2 replies"),
        (rounds([7, 1, 2, 3, 3]), "1–3, 7"),
        (listed(["a"]), "a"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (listed(list("abcdefgh")), "a, b, c, d, e, f and 2 more"),
    ],
)
def test_formats(shown: str, expected: str) -> None:
    assert shown == expected


def test_an_axis_begins_and_ends_at_round_numbers_around_its_values() -> None:
    axis = make_axis([0.62, 0.91])
    assert axis.ticks() == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0])
    assert [axis.label(tick) for tick in axis.ticks()] == ["0.6", "0.7", "0.8", "0.9", "1.0"]
    assert axis.at(0.7) == pytest.approx(25)
    assert make_axis([-0.3, 0.2]).label(-0.2) == "−0.2"


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e15, 1e-12])
def test_an_axis_of_equal_values_has_a_length(value: float) -> None:
    axis = make_axis([value, value])
    assert 0 <= axis.at(value) <= 100
    assert len(axis.ticks()) < 12


def test_a_strip_stands_where_its_values_are() -> None:
    strip = dumbbell(make_axis([0.0, 1.0]), 0.25, 0.75, ("alone", "own"), 0.125)
    for position in ('cx="25%"', 'cx="75%"', 'x1="62.5%"', 'x2="87.5%"'):
        assert position in strip


def test_the_column_of_a_round_reads_out_all_curves_and_levels() -> None:
    series = [Series("base model", "base", {0: 0.5}, level=True), Series("personal", "own", {0: 0.6, 2: 0.8})]
    chart = line_chart(series, label="mean", last=2, x_label="rounds")
    assert "<title>round 0: base model 0.500, personal 0.600</title>" in chart
    assert "<title>round 2: base model 0.500, personal 0.800</title>" in chart
    assert 'points="0.00,' in chart
    assert " 100.00," in chart
