"""Pieces of HTML. Whatever goes in as text comes out as text, whoever wrote it."""

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: Any) -> Html:
    """Anything as markup that shows it."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def join(parts: Iterable[Any], between: str = "") -> Html:
    return Html(between.join(text(part) for part in parts))


def tag(name: str, *inner: Any, **attributes: Any) -> Html:
    """<name attributes>inner</name>; `class_`, `data_x` stand for class, data-x; True for an attribute alone."""
    written = ""
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written += f" {key}"
        elif value is not None and value is not False:
            written += f' {key}="{text(value)}"'
    return Html(f"<{name}{written}>{join(inner)}</{name}>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: Any = None, numbers: bool = True) -> Html:
    """The first column names its row. A cell that is a number, or looks like one, stands on the right."""
    rows = [list(row) for row in rows]
    right = [
        numbers and place > 0 and any(_numeric(row[place]) for row in rows) and all(
            _numeric(row[place]) or not str(row[place]).strip("–") for row in rows
        )
        for place in range(len(head))
    ]  # fmt: skip
    titles = [tag("th", title, class_="number" if number else None) for title, number in zip(head, right, strict=True)]
    body = []
    for row in rows:
        cells = [tag("th", row[0], scope="row")]
        cells += [tag("td", cell, class_="number" if right[at] else "long") for at, cell in enumerate(row[1:], 1)]
        body.append(tag("tr", *cells))
    top = [tag("caption", caption)] if caption is not None else []
    whole = tag("table", *top, tag("thead", tag("tr", *titles)), tag("tbody", *body))
    return tag("div", whole, class_="scroll")


def _numeric(cell: Any) -> bool:
    return (
        re.fullmatch(r"[-+]?[\d,.]+(e[-+]?\d+)?( ?[%s])?( \([-+\d.]+ to [-+\d.]+\))?|nan|-?inf", str(cell)) is not None
    )


def folded(title: Any, *inner: Any, open_: bool = False) -> Html:
    return tag("details", tag("summary", title), *inner, open=open_)


def number(value: Any) -> str:
    """Four digits, thousands apart; a dash where there is nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return setting(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and value == round(value)):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def setting(value: Any) -> str:
    """A setting as it is written in YAML and on the command line."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def in_script(content: str) -> str:
    """JSON that can stand in a <script>: nothing in it ends the element or begins a comment."""
    for sign in "<>&\u2028\u2029":
        content = content.replace(sign, f"\\u{ord(sign):04x}")
    return content
