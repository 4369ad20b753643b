"""One HTML page of one run or several. It asks nobody for anything: code, styles, numbers and pictures are in it."""

import base64
import hashlib
from datetime import datetime
from pathlib import Path

from dino_sd import __version__
from dino_sd.report import sections
from dino_sd.report.album import pictures_section
from dino_sd.report.charts import Figures, bokeh_script
from dino_sd.report.folder import Run
from dino_sd.report.markup import Html, in_script, join, tag, text
from dino_sd.report.provenance import again_section, settings_section
from dino_sd.report.signs import Chart, charts_of

USE = " Across are the steps of training. Drag over a chart to zoom into all of them; tap a name to hide its line."
HERE = Path(__file__).parent


def page(runs: list[Run]) -> str:
    """The whole document."""
    figures = Figures(runs)
    curves = _curves(runs, figures)
    parts = [("Overview", "overview", "", [sections.overview(runs)])]
    if (signs := sections.health_table(runs)) is not None:
        about = "The numbers behind the verdict, taken from features and the teacher's output, without labels."
        parts.append(("Health signs", "health", about, [tag("div", signs, class_="card")]))
    parts += [("Scores", "scores", "", sections.scores_section(runs)), *curves]
    about = "The same few training images, through the eyes of the network as it learns."
    parts.append(("What it sees", "pictures", about, pictures_section(runs)))
    parts.append(("Trouble", "trouble", "", sections.trouble_section(runs)))
    parts.append(("What ran", "settings", "What differs from the defaults.", settings_section(runs)))
    parts.append(("Run it again", "again", "", again_section(runs)))
    parts = [part for part in parts if part[3]]
    links = [tag("a", heading, href=f"#{place}") for heading, place, _, _ in parts]
    body = [
        tag("section", tag("h2", heading), tag("p", about, class_="lead") if about else "", *inner, id=place)
        for heading, place, about, inner in parts
    ]
    many = len(runs) > 1
    title = f"{len(runs)} runs" if many else runs[0].name
    lead = ", ".join(run.name for run in runs) if many else sections.one_line(runs[0])
    written = f"Written by dino_sd {__version__} on {datetime.now():%Y-%m-%d %H:%M}."
    notes = " Long curves are thinned to their smallest and largest values." if figures.thinned else ""
    content = [
        tag("header", tag("div", tag("h1", title), tag("p", lead, class_="quiet"))),
        tag("nav", tag("div", *links)),
        tag("main", *body),
        tag("footer", written + notes),
    ]
    return _document(title, content, figures)


def _curves(runs: list[Run], figures: Figures) -> list[tuple[str, str, str, list[Html]]]:
    """Headings with their charts. Where they begin, a word on how to use them."""
    found = []
    keys = list(dict.fromkeys(key for run in runs for key in run.names()))
    for number, (heading, about, charts) in enumerate(charts_of(keys)):
        cards = [card for chart, labels in charts if (card := _card(figures, chart, labels)) is not None]
        use = USE + _marks(runs) if not number else ""
        if cards:
            found.append((heading, f"curves{number}", about + use, [tag("div", *cards, class_="charts")]))
    return found


def _marks(runs: list[Run]) -> str:
    went_on = " Dotted upright lines: a run went on from a checkpoint." if any(run.starts for run in runs) else ""
    return went_on + (" Red ones: a step was skipped." if any(run.anomalies for run in runs) else "")


def _card(figures: Figures, chart: Chart, labels: dict[str, str]) -> Html | None:
    scales = [False, True] if chart.log else [False]
    drawn = {log: found for log in scales if (found := figures.add(chart, labels, log)) is not None}
    if not drawn:
        return None
    first = chart.log == "first" and True in drawn
    plots = [tag("div", id=element, class_="plot", hidden=log != first) for log, (element, _) in drawn.items()]
    both = len(drawn) > 1
    entries = next(iter(drawn.values()))[1]
    legend = [
        tag("button", tag("span", class_=f"line {entry.dash}", style=f"border-color:{entry.color}"), entry.name,
            type="button", data_line=place, aria_pressed="true")
        for place, entry in enumerate(entries)
    ]  # fmt: skip
    below = [tag("div", *legend, class_="legend")] if len(legend) > 1 else []
    button = [tag("button", "linear scale" if first else "log scale", class_="scale", type="button")] if both else []
    title = tag("h3", chart.title, tag("small", f" {chart.unit}") if chart.unit else "")
    healthy = [tag("b", " Healthy: "), chart.healthy] if chart.healthy else []
    caption = tag("figcaption", chart.about, *healthy)
    return tag("figure", tag("header", title, *button), *plots, *below, caption, class_="card")


def _document(title: str, content: list[Html], figures: Figures) -> str:
    library, own, style = bokeh_script(), (HERE / "page.js").read_text(), (HERE / "page.css").read_text()
    # The browser itself forbids all requests, and all code but these two pieces: a second wall behind the escaping.
    codes = " ".join(f"'sha256-{_digest(code)}'" for code in (library, own))
    policy = f"default-src 'none'; script-src {codes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
    head = join([
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html('<link rel="icon" href="data:,">'),
        tag("title", f"{title} · dino_sd"),
        Html(f"<style>{style}</style>"),
    ])  # fmt: skip
    data = Html(f'<script type="application/json" id="curves">{in_script(figures.document())}</script>')
    scripts = [data, Html(f"<script>{library}</script>"), Html(f"<script>{own}</script>")]
    body = join([*content, *scripts])
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>{body}</body>\n</html>\n'


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
