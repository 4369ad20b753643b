"""What a page says of runs: how they are doing, what evaluators found, what went wrong."""

from typing import Any

from dino_sd import health
from dino_sd.log import duration
from dino_sd.report.charts import COLORS
from dino_sd.report.folder import Run, flat, is_number, length, seconds
from dino_sd.report.markup import Html, folded, join, number, table, tag
from dino_sd.report.signs import GROUPS, HEALTH, Chart, label_of
from dino_sd.tables import INTERVAL, heading, is_score

MOST_ROWS = 40  # of a list; the rest is counted
VERDICTS = {
    "learning": ("good", "Different images get different answers, and the numbers are calm."),
    "warming up": ("wait", "Too early to tell: the beginning of every run looks like a collapse."),
    "unstable": ("bad", "Single steps replace the weights, or the student does worse than guessing."),
    "collapsed: one point": ("bad", "Every image gets the same answer: the features lie in one point."),
    "collapsed: uniform": ("bad", "The teacher spreads its answer evenly over all prototypes: it tells images apart "
                                  "no more."),
}  # fmt: skip
UNKNOWN = ("wait", "")
SCORES = (("accuracy", "top-1"), ("knn", "k-NN top-1"), ("ensemble/accuracy", "exits together, top-1"))


def overview(runs: list[Run]) -> Html:
    cards = [_card(run, COLORS[place % len(COLORS)] if len(runs) > 1 else None) for place, run in enumerate(runs)]
    return tag("div", *cards, class_="runs several" if len(runs) > 1 else "runs")


def _card(run: Run, color: str | None) -> Html:
    found = run.verdicts()
    name = found[-1][1] if found else "no verdict"
    tone, meaning = VERDICTS.get(name, UNKNOWN)
    if not found:
        meaning = "Nothing has judged this run yet: it is too short for a health check, or older than they are."
    swatch = [tag("span", class_="swatch", style=f"background:{color}")] if color else []
    parts = [tag("h3", *swatch, *([run.name] if color else []), tag("span", name, class_=f"verdict {tone}"))]
    parts.append(tag("p", meaning))
    if remedy := health.REMEDIES.get(name):
        parts.append(tag("p", tag("b", "Try "), remedy, "."))
    if found:
        parts.append(_history(found))
    parts += [tag("p", note, ".", class_="quiet") for note in run.notes]
    parts.append(_tiles(run))
    return tag("div", *parts, class_="card run")


def _history(found: list[tuple[int, str]]) -> Html:
    """Verdicts as a bar in time, and in words."""
    stretches: list[tuple[int, int, str]] = []
    before = 0
    for step, name in found:
        if stretches and stretches[-1][2] == name:
            stretches[-1] = (stretches[-1][0], step, name)
        else:
            stretches.append((before, step, name))
        before = step
    bars = [
        tag("span", class_=VERDICTS.get(name, UNKNOWN)[0], style=f"flex:{max(end - start, 1)}",
            title=f"{name}: step {start:,} to {end:,}")
        for start, end, name in stretches
    ]  # fmt: skip
    words = ", then ".join(f"{name} until step {end:,}" for _, end, name in stretches[-4:])
    words = f"… {words}" if len(stretches) > 4 else words
    return join([tag("div", *bars, class_="history", role="img", aria_label=words), tag("small", words)])


def _tiles(run: Run) -> Html:
    total, batch = length(run), run.count("batch_size")
    state = "steps" if total is None else "finished" if run.step >= total else f"{run.step / total:.0%} of {total:,}"
    tiles: list[tuple[str, str, str]] = [("Steps", f"{run.step:,}", state)]
    if batch:
        epoch = run.last("epoch")
        tiles.append(("Images seen", f"{run.step * batch:,.0f}", f"{epoch:.3g} epochs" if epoch is not None else ""))
    for key, name in SCORES:
        values = run.series(key)[1]
        if values:
            since = f"from {values[0]:.1f} %" if len(values) > 1 else ""
            tiles.append((name, f"{values[-1]:.1f} %", since))
    for found in run.evaluations.values():
        if (first := _first(found)) is not None:
            tiles.append((f"{found.get('evaluator')}, top-1", f"{first:.1f} %", _whose(found)))
    for key, name, unit in (
        ("loss", "Loss", "nats"), ("feature_spread", "Feature spread", "0 to 1"),
        ("health/effective_rank", "Effective rank", "directions"),
    ):  # fmt: skip
        if (value := run.last(key)) is not None:
            tiles.append((name, number(value), unit))
    if (speed := run.last("images_per_s")) is not None:
        waiting = run.last("data_wait")
        waited = f", {waiting:.0%} waiting" if waiting else ""
        tiles.append(("Speed", f"{speed:,.0f}", f"images/s{waited}"))
    if (spent := seconds(run)) is not None:
        tiles.append(("Time in training", duration(spent), "without evaluations"))
    shown = (tag("div", tag("dt", name), tag("dd", value, tag("small", more))) for name, value, more in tiles)
    return tag("dl", *shown, class_="tiles")


def _first(found: dict[str, Any]) -> float | None:
    """The top-1 accuracy of an evaluation; of several rows the first: the best would be chosen on the test set."""
    rows = found.get("results")
    scores = [row.get("top1") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return next((score for score in scores if is_number(score)), None)


def _whose(found: dict[str, Any]) -> str:
    """Which network was judged."""
    known = found.get("provenance")
    known = known if isinstance(known, dict) else {}
    exit = known.get("exit")
    words = [f"{known['network']}" if known.get("network") else "evaluated"]
    words += [f"at step {known['step']:,}"] if is_number(known.get("step")) else []
    return " ".join([*words, *([f"up to block {exit}"] if is_number(exit) else [])])


def one_line(run: Run) -> str:
    """The run in a sentence."""
    config, data = run.config, run.config.get("data")
    source = data.get("source") if isinstance(data, dict) else data
    names = source if isinstance(source, list) else [source] if source else []
    terms = config.get("terms")
    learnt = " + ".join(map(str, terms)) if isinstance(terms, dict) else ""
    model = str(config.get("model", "a model that nobody noted"))
    parts = [f"{model} on {', '.join(map(str, names))}" if names else model]
    parts += [f"learns by {learnt}"] if learnt else []
    parts += [f"{config['batch_size']} images a step"] if "batch_size" in config else []
    return " · ".join(parts)


def health_table(runs: list[Run]) -> Html | None:
    """First and last value of every sign, with what one wants to see."""
    rows = []
    several = len(runs) > 1
    charts = [chart for _, _, charts in GROUPS for chart in charts]
    for key, name in HEALTH.items():
        chart = next(chart for chart in charts if label_of(chart, key) is not None)
        cells = [_sign(run, key, chart, several) for run in runs]
        if any(cells):
            rows.append([name, *(cell or "–" for cell in cells), chart.healthy])
    if not rows:
        return None
    shown = table(["sign", *(run.name if several else "first → last" for run in runs), "healthy"], rows, numbers=False)
    return tag("div", shown, class_="stacked several" if several else "stacked")


def _sign(run: Run, key: str, chart: Chart, named: bool) -> Html | None:
    values = run.series(key)[1]
    if not values:
        return None
    now = values[-1]
    inside = any((z.low is None or now > z.low) and (z.high is None or now < z.high) for z in chart.zones)
    dot = tag("span", class_=f"dot {'bad' if inside or now != now else 'good'}") if chart.zones else Html("")
    shown = f"{number(values[0])} → {number(now)}" if len(values) > 1 else number(now)
    return tag("span", dot, shown, class_="sign", data_run=f"{run.name}: " if named else None)


def scores_section(runs: list[Run]) -> list[Html]:
    """What evaluators found, and the scores of training in numbers."""
    parts = []
    for run in runs:
        title = [tag("h3", run.name)] if len(runs) > 1 else []
        tables = [_evaluation(name, found) for name, found in run.evaluations.items()]
        keys = [key for key in run.names() if key.split("/")[-1] in ("knn", "accuracy", "accuracy_top5")]
        keys = [key for key in keys if not key.startswith(tuple(run.terms)) or "/" not in key]
        lines = [line for line in run.lines if any(is_number(line.get(key)) for key in keys)]
        if lines:
            rows = [[f"{line['step']:,}", *(_percent(line.get(key)) for key in keys)] for line in lines]
            head = ["step", *(f"{key}, %" for key in keys)]
            tables.append(folded(f"Scores during training ({len(rows)} times)", table(head, rows), open_=not tables))
        if tables:
            parts.append(tag("div", *title, *tables, class_="card part"))
    return parts


def _percent(value: Any) -> str:
    return f"{value:.2f}" if is_number(value) else "–"


def _evaluation(name: str, found: dict[str, Any]) -> Html:
    """A table of what an evaluator, or a suite of them, has written: whatever rows of values it holds."""
    listed = next((found[key] for key in ("results", "rows") if isinstance(found.get(key), list)), [])
    rows = [row for row in listed if isinstance(row, dict)]
    if not rows:
        plain_values = {key: value for key, value in flat(found) if is_number(value) or isinstance(value, str)}
        return folded(name, table(["", "value"], [(key, number(value)) for key, value in plain_values.items()]))
    columns = list(dict.fromkeys(key for row in rows for key in row if not key.endswith(INTERVAL)))
    head = [heading(key) if is_score(key) else key for key in columns]
    said = [str(found.get("model", ""))]
    for key, word in (("train", "learnt on"), ("test", "judged on")):
        data = found.get(key)
        if isinstance(data, dict):
            said.append(f"{word} {number(data.get('images'))} images of {data.get('data')}")
    said += [f"{found['seconds']:.0f} s"] if is_number(found.get("seconds")) else []
    about = tag("p", tag("small", "; ".join(part for part in said if part)))
    caption = str(found.get("evaluator") or found.get("suite") or name)
    return join([table(head, [[_score(row, key) for key in columns] for row in rows], caption), about])


def _score(row: dict[str, Any], key: str) -> str:
    """Scores with two digits and their 95% interval, anything else as it is."""
    value, ends = row.get(key), row.get(key + INTERVAL)
    if not (is_score(key) and is_number(value)):
        return number(value)
    if isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)):
        return f"{value:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"
    return f"{value:.2f}"


def trouble_section(runs: list[Run]) -> list[Html]:
    """Files that cannot be read and steps that were skipped; nothing where there was no trouble."""
    parts = []
    for run in runs:
        tables = []
        if run.bad_files:
            rows = [[entry.get("path", "?"), entry.get("reason", "")] for entry in run.bad_files[:MOST_ROWS]]
            caption = f"{len(run.bad_files):,} image(s) could not be read; others stood in for them"
            tables += [table(["file", "reason"], rows, caption, numbers=False), _more(run.bad_files, "bad_files.jsonl")]
        if run.anomalies:
            rows = [
                [f"{number(entry.get('step'))}", str(entry.get("gradient_norm", "–")), _found(entry)]
                for entry in run.anomalies[:MOST_ROWS]
            ]
            caption = f"{len(run.anomalies):,} step(s) were skipped: their numbers were not finite"
            head = ["step", "gradient norm", "where"]
            tables += [table(head, rows, caption, numbers=False), _more(run.anomalies, "anomalies.jsonl")]
        if tables:
            title = [tag("h3", run.name)] if len(runs) > 1 else []
            parts.append(tag("div", *title, *tables, class_="card part"))
    return parts


def _more(entries: list[Any], name: str) -> Html:
    left = len(entries) - MOST_ROWS
    return tag("p", f"{left:,} more in {name}", class_="quiet") if left > 0 else Html("")


def _found(entry: dict[str, Any]) -> str:
    found = entry.get("found")
    said = []
    for each in found if isinstance(found, list) else []:
        if isinstance(each, dict):
            terms, files = each.get("terms"), each.get("files")
            names = ", ".join(f"{name} {value}" for name, value in terms.items()) if isinstance(terms, dict) else ""
            some = ", ".join(map(str, files[:4])) if isinstance(files, list) else ""
            more = f" and {len(files) - 4} more" if isinstance(files, list) and len(files) > 4 else ""
            said.append(f"rank {each.get('rank')}: {names}; images {some}{more}")
    return "; ".join(said) or "in the gradient"
