"""A user's words (labels, names, values) in Markdown, shown as they are: a function for each place."""

import html
import json
import re

_SPECIAL = re.compile(r"[\\`*\[\]<|~]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")


def text(value: str) -> str:
    """In a sentence, a heading, a list or a cell of a table: on one line, and no sign of it means anything."""
    return " ".join(_SPECIAL.sub(lambda found: f"\\{found.group()}", value).split())


def code(value: str, *, in_table: bool = False) -> str:
    """As a code span, in which nothing is escaped but the bar of a table.

    What would not be seen in one (line ends, blanks at its ends, signs of no width, nothing at all) is shown in quotes.
    """
    if not value.isprintable() or value != " ".join(value.split()) or not value:
        value = json.dumps(value, ensure_ascii=not value.isprintable())
    if in_table:
        value = value.replace("|", "\\|")
    # Longer than every row of backticks inside; those at an end need a blank beside them, which is not shown.
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", value)), default=0))
    blank = " " if value.startswith("`") or value.endswith("`") else ""
    return f"{fence}{blank}{value}{blank}{fence}"


def inside_html(value: str) -> str:
    """Inside a line of HTML, where Markdown means nothing."""
    return " ".join(html.escape(value, quote=False).split())
