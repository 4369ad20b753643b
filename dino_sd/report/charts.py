"""The curves of runs as Bokeh figures, linked in x, and the JSON that a page draws them from."""

import json
import math
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from dino_sd.report.folder import Run
from dino_sd.report.signs import Chart

COLORS = ("#3d85dd", "#d9730d", "#1f9d6b", "#9160d8", "#d64550", "#1593a6", "#a08a10", "#c74b95")  # on black and white
DASHES = ("solid", "dashed", "dotted", "dotdash")
MOST_POINTS = 3_000  # of a curve
MOST_MARKS = 60  # vertical lines of a kind in a chart


class Curve(NamedTuple):
    """steps, values: of one series; nan where a value is not finite. thinned: whether points are left out."""

    steps: np.ndarray
    values: np.ndarray
    thinned: bool


class Entry(NamedTuple):
    """A line of a chart in its legend."""

    name: str
    color: str
    dash: str


def curve(steps: list[int], values: list[float], most: int = MOST_POINTS) -> Curve:
    """All points, or, of more than `most`, the smallest and the largest of each stretch: no peak is lost."""
    steps_n, values_n = np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)
    values_n[~np.isfinite(values_n)] = math.nan
    if len(steps_n) <= most:
        return Curve(steps_n, values_n, False)
    kept = {0, len(steps_n) - 1}
    for part in np.array_split(np.arange(len(steps_n)), most // 2):
        some_n = values_n[part]
        if not np.isnan(some_n).all():
            kept |= {int(part[np.nanargmin(some_n)]), int(part[np.nanargmax(some_n)])}
    chosen = np.array(sorted(kept))
    return Curve(steps_n[chosen], values_n[chosen], True)


class Figures:
    """Figures of one page. They share the range of x: a zoom into one is a zoom into all.

    `add` each, then `document` gives what the page needs.
    """

    def __init__(self, runs: list[Run]):
        from bokeh.models import Range1d

        self.runs, self.figures = runs, []
        self.colors = {id(run): color for run, color in zip(runs, cycle(COLORS), strict=False)}
        end = max([run.step for run in runs] + [1])
        self.end = end
        self.x = Range1d(start=-0.01 * end, end=1.02 * end, bounds=(-0.05 * end, 1.05 * end), min_interval=end / 1e4)
        self.most = max(2 * MOST_POINTS // (len(runs) + 1), 200)
        self.thinned = False

    def add(self, chart: Chart, labels: dict[str, str], log: bool) -> tuple[str, list[Entry]] | None:
        """Draws a chart; returns the id of the page's element for it, and its legend. None: nothing to see."""
        found = [
            (run, key, curve(*points, self.most))
            for run in self.runs
            for key in labels
            if (points := run.series(key))[0]
        ]
        if log:
            found = [each for each in found if (each[2].values > 0).any()]
        finite = [each[2].values[np.isfinite(each[2].values)] for each in found]
        if not any(map(len, finite)):
            return None
        self.thinned |= any(each[2].thinned for each in found)
        figure = self._figure(chart, log, tiny=max(abs(values).max() for values in finite if len(values)) < 0.01)
        many, entries = len(self.runs) > 1, []
        for run, key, points in found:
            place, label = list(labels).index(key), labels[key]
            name = f"{run.name}: {label}" if many and len(labels) > 1 else run.name if many else label
            color = self.colors[id(run)] if many else COLORS[place % len(COLORS)]
            entries.append(Entry(name, color, DASHES[place % len(DASHES)] if many else DASHES[0]))
            self._line(figure, points, key, entries[-1], len(entries) - 1)
        self._tools(figure, chart)
        self._marks(figure)
        self.figures.append(figure)
        return f"chart{len(self.figures) - 1}", entries

    def _figure(self, chart: Chart, log: bool, tiny: bool) -> Any:
        from bokeh import models
        from bokeh.plotting import figure as new

        figure = new(
            height=250, sizing_mode="stretch_width", x_range=self.x, y_axis_type="log" if log else "linear",
            tools="", toolbar_location="above", background_fill_color=None, border_fill_color=None,
            outline_line_color=None, min_border=4, lod_threshold=None,
        )  # fmt: skip
        figure.toolbar.logo = None
        figure.xaxis.formatter = models.NumeralTickFormatter(format="0.[0]a" if self.end >= 1e5 else "0,0")
        if tiny:
            figure.yaxis.formatter = models.BasicTickFormatter()
        else:
            figure.yaxis.formatter = models.NumeralTickFormatter(format=chart.format)
        axes: list[Any] = [*figure.xaxis, *figure.yaxis]
        for axis in axes:
            axis.ticker.desired_num_ticks = 5
            axis.minor_tick_line_color = None
        for zone in chart.zones:
            ends: dict[str, Any] = {"bottom": zone.low, "top": zone.high}
            ends = {name: end for name, end in ends.items() if end is not None}
            figure.add_layout(models.BoxAnnotation(fill_color=COLORS[4], fill_alpha=0.12, line_color=None, **ends))
        return figure

    def _line(self, figure: Any, points: Curve, key: str, entry: Entry, place: int) -> None:
        from bokeh.models import ColumnDataSource

        whole = np.int32 if points.steps.max() < 2**31 else np.float64
        data = {"step": points.steps.astype(whole), "value": points.values.astype(np.float32)}
        source, style = ColumnDataSource(data, name=key), {"name": entry.name, "color": entry.color}
        drawn = [figure.line("step", "value", source=source, line_width=2, line_dash=entry.dash, **style)]
        if len(points.steps) <= 40:
            drawn.append(figure.scatter("step", "value", source=source, size=5, **style))
        for renderer in drawn:
            renderer.tags = [place]  # the number of its button in the legend

    def _tools(self, figure: Any, chart: Chart) -> None:
        from bokeh import models

        box = models.BoxZoomTool(description="drag to zoom")
        hover = models.HoverTool(
            renderers=[line for line in figure.renderers if isinstance(line.glyph, models.Line)], mode="vline",
            point_policy="snap_to_data", line_policy="nearest", attachment="horizontal",
            description="values where the pointer is",
            tooltips=[("", "$name"), ("step", "@step{0,0}"), (chart.unit or "value", "@value{0.[000000]}")],
        )  # fmt: skip
        figure.add_tools(
            box,
            models.PanTool(description="drag to move"),
            models.WheelZoomTool(description="wheel or pinch to zoom"),
            models.ResetTool(description="all of it again"),
            hover,
        )
        figure.toolbar.active_drag = box

    def _marks(self, figure: Any) -> None:
        """Where a run went on from a checkpoint, and steps that were skipped."""
        from bokeh.models import Span

        for run in self.runs:
            skipped = [line["step"] for line in run.anomalies if isinstance(line.get("step"), int)]
            for steps, color, dash in ((run.starts, "#888888", "dotted"), (skipped, COLORS[4], "solid")):
                for step in steps[:MOST_MARKS]:
                    span = Span(location=step, dimension="height", line_color=color, line_dash=dash, line_alpha=0.7)
                    figure.add_layout(span)

    def document(self) -> str:
        """JSON: [documents, items] as Bokeh.embed.embed_items takes them."""
        from bokeh.core.json_encoder import serialize_json
        from bokeh.document import Document

        document = Document()
        with document.models.freeze():  # otherwise it goes through all models after each of them
            for figure in self.figures:
                document.add_root(figure)
        content = document.to_json(deferred=False)
        roots = {figure.ref["id"]: f"chart{number}" for number, figure in enumerate(self.figures)}
        items = [{"docid": "curves", "roots": roots, "root_ids": list(roots)}]
        return json.dumps([json.loads(serialize_json({"curves": content})), items])


def bokeh_script() -> str:
    """The library's own code, without its plots of tables and widgets."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw)
