"""A user's words come out of Markdown as they went in."""

import pytest

from hf_mtcompress.publishing.card import render_card
from hf_mtcompress.publishing.lint import lint_card_of_files
from hf_mtcompress.publishing.markup import code, inside_html, text
from hf_mtcompress.publishing.report import report_table
from tests.unit.publishing.factory import make_record


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("<b>", "`<b>`"),
        ("no|pe", "`no|pe`"),
        ("a&amp;b", "`a&amp;b`"),
        ("*x* \\_", "`*x* \\_`"),
        ("a`b", "``a`b``"),
        ("``", "``` `` ```"),
        ("`", "`` ` ``"),
        ("", '`""`'),
        (" x", '`" x"`'),
        ("two  blanks", '`"two  blanks"`'),
        ("line\nend", '`"line\\nend"`'),
        ("zero\u200bwidth", '`"zero\\u200bwidth"`'),
        ("größe 1", "`größe 1`"),
    ],
)
def test_code_spans(value: str, shown: str):
    """What is escaped inside of a code span is shown with its escapes: `&lt;b>` for `<b>`."""
    assert code(value) == shown


def test_a_bar_is_escaped_in_tables_alone():
    """GitHub's tables take the backslash away inside of code, too; elsewhere it would be seen."""
    assert code("no|pe", in_table=True) == "`no\\|pe`"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a|b c\n<d>", "a\\|b c \\<d>"),
        ("snips_nlu", "snips_nlu"),
        ("_x_ *y* `z`", "\\_x\\_ \\*y\\* \\`z\\`"),
        ("[a](b) &lt; & \\ ~~c~~", "\\[a\\](b) \\&lt; & \\\\ \\~\\~c\\~\\~"),
    ],
)
def test_text(value: str, shown: str):
    """A data set that is called `_x_` would be shown in italics, and a link would be one."""
    assert text(value) == shown


def test_inside_html():
    assert inside_html("a <b> & _c_") == "a &lt;b> &amp; _c_".replace("b>", "b&gt;")


def test_the_card_shows_labels_as_they_are():
    record = make_record()
    record.tasks["intent"].labels = ["<b>", "no|pe", "a`b", " x", "[a](b)", "below\n-1"]
    record.tasks["intent"].dataset_id = "my <rows> | *all* [x](y)"
    card = render_card(record)
    assert '- `intent`: `<b>`, `no|pe`, ``a`b``, `" x"`, `[a](b)`, `"below\\n-1"`\n' in card
    assert "| my \\<rows> \\| \\*all\\* \\[x\\](y), " in card
    assert lint_card_of_files(card, {"record.json", "assets/comparison.png", "assets/interference.png"}, record) == []


def test_the_terminal_shows_no_markdown():
    """Sentences that card and terminal share hold no escapes."""
    assert "\\" not in report_table(make_record())
