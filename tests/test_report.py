"""The page says what the folder holds, to the number; it asks nobody, runs nothing that it was not given, and a run
does not notice that it is written."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_identical
from PIL import Image
from test_errors import run_cli

from dino_sd import build, recipe, sheets
from dino_sd import report as package
from dino_sd.config import ReportSettings
from dino_sd.data.loader import Batches
from dino_sd.data.photometry import Photometry
from dino_sd.errors import Halted
from dino_sd.report import charts, folder, report, training
from dino_sd.report.charts import curve
from dino_sd.report.signs import charts_of
from dino_sd.settings import plain
from dino_sd.train import train

pytest.importorskip("bokeh")
from browser import CHROMIUM, visit  # noqa: E402 (its socket is Tornado's, which comes with Bokeh)

EVIL = "<script>window.hacked=1</script>"
QUOTED = '"\'><img src=x onerror="window.hacked=1"> &amp; ${1+1} {{x}} $name \u2028'


class Page(HTMLParser):
    """tags: (name, attributes) in order. texts: what a reader reads. curves: {(key, name): (steps, values)}."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside, self.texts, self.json = "", "", ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.documents, self.items = json.loads(self.json)
        self.curves = {}
        for figure in self.documents["curves"]["roots"]:
            for renderer in figure["attributes"]["renderers"]:
                source = renderer["attributes"].get("data_source", {}).get("attributes")
                if source:
                    columns = {column: decoded(value) for column, value in source["data"]["entries"]}
                    name = renderer["attributes"]["name"]
                    self.curves[source["name"], name] = columns["step"], columns["value"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = "json" if dict(attrs).get("id") == "curves" else tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "json":
            self.json += data
        elif self.inside not in ("script", "style"):
            self.texts += data


def decoded(array: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(array["array"]["data"])), array["dtype"])


def fake_run(path: Path, lines: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
    """A folder as a run leaves it, without having trained."""
    path.mkdir(parents=True)
    pairs = [f"out={path}", *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())]
    cfg = recipe.load_config("quickstart", pairs)
    (path / "config.yaml").write_text(yaml.safe_dump(plain(cfg), sort_keys=False))
    environment = {"command": ["/bin/dino-sd", "train", "x y.yaml"], "dino_sd": "0.1.0", "torch": "2.14.1", "ranks": 1}
    (path / "environment.json").write_text(json.dumps(environment))
    if lines is None:
        lines = [{"step": 0, "knn": 60.0}]
        lines += [
            {"step": step, "loss": 7 - step / 900, "dino/loss_share": 1 - step / 4000, "feature_spread": 0.5,
             "lr": 1e-3, "images_per_s": 100.0, "epoch": step / 156, "health/spread": 0.4, "health/update_norm": 1e-3,
             "health/verdict": "warming up" if step < 300 else "learning", "knn": 60 + step / 100}
            for step in range(100, 1001, 100)
        ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def page_of(*runs: Path, **settings: Any) -> Page:
    out = runs[0].parent / "page.html"
    return Page(report(list(runs), ReportSettings(out=str(out), pictures=False, **settings)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of twenty steps that evaluates and reports."""
    from conftest import TINY

    torch.set_num_threads(1)  # as every test has it: similarities that are drawn end in other digits
    tmp = tmp_path_factory.mktemp("report")
    changes = {"evaluate": {"every": "steps=10", "crop": 1.0, "train": "fashion-mnist-mini:test",
                            "test": "fashion-mnist-mini:test"},
               "report": {"every": "steps=10"}, "health": {"every": 5}, "out": str(tmp / "run")}  # fmt: skip
    (tmp / "tiny.yaml").write_text(yaml.safe_dump(TINY | changes))
    train(recipe.load_config(tmp / "tiny.yaml", []))
    return tmp / "run"


def test_curves_are_the_numbers_of_the_log(trained: Path):
    page = Page(trained / "report.html")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key, value in line.items() if isinstance(value, (int, float))}
    drawn = {key: points for (key, _), points in page.curves.items()}
    assert keys - drawn.keys() == {"step", "epoch", "health/loss", "health/rank_share"}
    for key in keys & drawn.keys():
        steps, values = drawn[key]
        assert steps.tolist() == [line["step"] for line in lines if key in line], key
        assert np.allclose(values, [line[key] for line in lines if key in line], rtol=1e-6, atol=0), key
    steps, values = drawn["schedule/teacher.momentum"]  # 0.9 to 1, half a cosine
    assert np.allclose(values, 1 - 0.05 * (1 + np.cos(np.pi * steps / 20)), atol=1e-6)


def test_page_asks_nobody_and_is_small(trained: Path):
    page = Page(trained / "report.html")
    assert len(page.html.encode()) < 5_000_000
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    policy = next(value["content"] for tag, value in page.tags if tag == "meta" and "http-equiv" in value)
    assert policy and policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
    assert "url(http" not in page.html.split("</style>")[0] and "@import" not in page.html.split("</style>")[0]


def test_pictures_through_training(trained: Path):
    """Untrained, halfway and at the end, of the same images; the crops are those of the step."""
    kinds = {"attention", "pca", "neighbours", "crops"}
    assert {p.name for p in (trained / "report").iterdir()} == {
        f"step_{step:08d}_{kind}.webp" for step in (0, 10, 20) for kind in kinds
    }
    page = Page(trained / "report.html")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 12 and all(str(a["src"]).startswith("data:image/webp;base64,") for a in images)
    buttons = [attributes for tag, attributes in page.tags if tag == "button"]
    assert [a["aria-pressed"] for a in buttons if "aria-pressed" in a][-3:] == ["false", "false", "true"]
    first, last = ((trained / f"report/step_000000{n}_pca.webp").read_bytes() for n in ("00", "20"))
    assert first != last


@pytest.mark.parametrize("step", [0, 3, 17])
def test_crops_of_a_step_are_those_that_training_sees(tiny, tmp_path: Path, step: int):
    cfg = tiny(tmp_path / "run", data="fashion-mnist-mini:test", batch_size=256, views__local__count=3)
    source, spec = build.open_data(cfg), build.view_spec(cfg)
    batch = next(iter(Batches(source, spec, cfg.seed, 256, start_step=step, total_steps=step + 1)))
    photometry = Photometry(spec, [0.0], [1.0])
    crops = sheets.crops_of_step(cfg, source, 5, step)
    assert crops.indices == batch.indices[:5].tolist()
    for ours, raw, rows in zip(crops.groups, batch.groups, batch.rows, strict=True):
        assert torch.equal(ours, photometry(raw, rows).unflatten(0, (-1, 256))[:, :5])


@pytest.mark.parametrize("model", [{}, {"model": "resnet10t", "model_args": {}}])
def test_a_run_does_not_notice(tiny, tmp_path: Path, model: dict[str, Any]):
    """Drop-path draws, batch norm remembers: with and without reports they end in the same bits."""
    options = {"steps": 4, "batch_size": 8, "checkpoint__every": "steps=2", "log__every": 2, **model}
    without = train(tiny(tmp_path / "without", **options))
    reported = train(tiny(tmp_path / "with", report__every="steps=2", **options))
    assert_identical(without, reported)
    assert (tmp_path / "with/report.html").exists() and not (tmp_path / "without/report.html").exists()
    kinds = {path.name.split("_")[2] for path in (tmp_path / "with/report").glob("*.webp")}
    assert kinds == {"pca.webp", "neighbours.webp", "crops.webp"} | (set() if model else {"attention.webp"})
    logs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("with", "without")]
    for log in logs:
        for line in log:
            line.pop("images_per_s"), line.pop("data_wait")
    assert logs[0] == logs[1]


def test_a_run_that_goes_on(tiny, tmp_path: Path):
    """It is marked where it did; pictures of steps that are done again are forgotten."""
    run = tmp_path / "run"
    options = {"steps": 12, "batch_size": 8, "checkpoint__every": "steps=4", "checkpoint__keep": 9}
    last = train(tiny(run, report__every="steps=6", **options))
    last.unlink()
    stale = run / "report/step_00000009_pca.webp"
    stale.write_bytes(b"of another life")
    train(tiny(run, report__every="steps=6", **options))
    assert folder.read_run(run).starts == [8]
    assert not stale.exists() and (run / "report/step_00000006_pca.webp").exists()
    spans = re.findall(r'"name":"Span".{0,200}?"location":(\d+)', Page(run / "report.html").json.replace(" ", ""))
    assert spans and {*spans} == {"8"}


def test_pages_of_short_runs_wait_for_the_end(tiny, tmp_path: Path, monkeypatch, capsys):
    """A page costs a second or two: before the end it is written where that is less than 1% of the time so far."""
    written = []
    monkeypatch.setattr(training, "write", lambda runs, out: written.append(out))
    train(tiny(tmp_path / "a", steps=8, batch_size=8, report__every="steps=4"))
    assert written == [tmp_path / "a/report.html"]
    monkeypatch.setattr(training, "SHARE", 1e9)
    train(tiny(tmp_path / "b", steps=8, batch_size=8, report__every="steps=4"))
    assert len(written) == 1 + 2
    assert f"report: {tmp_path / 'b/report.html'}" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["write", "FixedImages"])
def test_a_report_that_fails_costs_nothing(tiny, tmp_path: Path, monkeypatch, capsys, broken: str):
    def fails(*_: Any) -> None:
        raise RuntimeError("nothing works\nat all")

    monkeypatch.setattr(training, broken, fails)
    reported = train(tiny(tmp_path / "with", steps=4, batch_size=8, report__every="steps=2"))
    said = capsys.readouterr().err
    assert said.count("warning: the report cannot be written (RuntimeError: nothing works); the run goes on") == 1
    assert_identical(train(tiny(tmp_path / "without", steps=4, batch_size=8)), reported)


def test_a_run_that_a_guard_stops_has_a_page(tiny, tmp_path: Path, monkeypatch):
    def stopped(*_: Any) -> None:
        raise Halted("collapsed")

    monkeypatch.setattr("dino_sd.health.Health.act", stopped)
    with pytest.raises(Halted):
        train(tiny(tmp_path / "run", steps=9, batch_size=8, health__every=5, report__every=1.0))
    assert "health/spread" in {key for key, _ in Page(tmp_path / "run/report.html").curves}


def test_without_the_extra(tiny, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(package, "has_extra", lambda: False)
    monkeypatch.setattr(training, "has_extra", lambda: False)
    code, said = run_cli(monkeypatch, capsys, "report", fake_run(tmp_path / "run"))
    assert code == 2 and "pip install 'dino-sd[report]'" in said
    train(tiny(tmp_path / "trained", steps=2, batch_size=8, report__every="steps=2"))
    said = capsys.readouterr().err
    assert said.count("dino-sd[report]") == 1 and f"dino-sd report {tmp_path / 'trained'}" in said
    assert not (tmp_path / "trained/report").exists()


def test_command_draws_what_is_missing(trained: Path, tmp_path: Path, monkeypatch, capsys):
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "report")
    code, said = run_cli(monkeypatch, capsys, "report", run)
    assert code == 0, said
    drawn = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    assert len(drawn) == 4  # those of the checkpoint are those that training drew
    assert drawn == {name: (trained / "report" / name).read_bytes() for name in drawn}
    assert sum(tag == "img" for tag, _ in Page(run / "report.html").tags) == 4
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["source"] = ["/gone"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    shutil.rmtree(run / "report")
    code, said = run_cli(monkeypatch, capsys, "report", run, f"out={tmp_path / 'other.html'}")
    assert code == 0 and "could not be drawn" in Page(tmp_path / "other.html").texts
    assert run_cli(monkeypatch, capsys, "report", tmp_path / "nothing")[0] == 2
    assert run_cli(monkeypatch, capsys, "report", tmp_path)[0] == 2
    assert run_cli(monkeypatch, capsys, "report", "pictures=false")[0] == 2


def evil_run(tmp_path: Path) -> Path:
    """Everything that can have a name has a bad one."""
    run = fake_run(tmp_path / EVIL.replace("/", "\u2215"), [
        {"step": 100, "loss": 1.0, EVIL: 2.0, QUOTED: 3.0, f"{EVIL}/loss": 1.0, f"{QUOTED}/loss": 4.0,
         "health/verdict": EVIL, "images_per_s": 10.0, "epoch": 1.0},
        {"step": 200, "loss": 1.0, EVIL: 2.0, QUOTED: 3.0, f"{EVIL}/loss": 1.0, "health/verdict": QUOTED},
    ])  # fmt: skip
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"model": EVIL, QUOTED: EVIL, "data": {"source": [EVIL, QUOTED]}}
    config["terms"][EVIL] = {QUOTED: {"start": 1, "end": 2, "shape": EVIL}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {"command": ["dino-sd", EVIL, QUOTED], "torch": EVIL, "commit": QUOTED, EVIL: QUOTED, "ranks": EVIL}
    (run / "environment.json").write_text(json.dumps(environment))
    bad = {"index": 1, "path": f"/data/{EVIL}/{QUOTED}.jpg", "reason": EVIL}
    (run / "bad_files.jsonl").write_text(json.dumps(bad) + "\n")
    anomaly = {
        "step": 150,
        "gradient_norm": EVIL,
        "found": [{"rank": EVIL, "terms": {EVIL: QUOTED}, "files": [QUOTED]}],
    }
    (run / "anomalies.jsonl").write_text(json.dumps(anomaly) + "\n" + json.dumps({"step": EVIL, "found": EVIL}) + "\n")
    (run / "evaluations").mkdir()
    rows = [{"k": 20, "top1": 71.0, EVIL: QUOTED}]
    result = {"evaluator": EVIL, "model": QUOTED, "results": rows, "test": {"data": EVIL, "images": EVIL}}
    (run / "evaluations" / "<b>&.json").write_text(json.dumps(result))
    (run / "evaluations" / "other.json").write_text(json.dumps({EVIL: {QUOTED: EVIL}}))
    (run / "report").mkdir()
    (run / "report/step_00000100_pca.webp").write_bytes(b"<svg onload='window.hacked=1'>")
    return run


def test_names_are_text(tmp_path: Path):
    run, other = evil_run(tmp_path), fake_run(tmp_path / QUOTED)
    for runs in ((run,), (run, other)):
        page = page_of(*runs)
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        assert [sorted(attributes) for attributes in scripts] == [["id", "type"], [], []]
        assert not [tag for tag in page.tags if any(name.startswith("on") for name in tag[1])]
        assert not [tag for tag, _ in page.tags if tag in ("svg", "iframe", "object", "embed", "base", "form")]
        assert "<" not in page.json and "\u2028" not in page.json
        for name in (EVIL, QUOTED, f"/data/{EVIL}/{QUOTED}.jpg", "<b>&"):
            assert name in page.texts or name == "<b>&", name
        assert {EVIL, QUOTED} <= {key for key, _ in page.curves}


def test_damaged_files_are_read_as_far_as_they_go(tmp_path: Path):
    run = fake_run(tmp_path / "run")
    whole = (run / "metrics.jsonl").read_text()
    cut = whole[:-40] + '\n[1, 2]\n{"step": "x"}\nnull\n' + '{"step": 1100, "loss": NaN, "feature_spread": Infinity}\n'
    (run / "metrics.jsonl").write_text(cut)
    (run / "environment.json").write_text('{"python": ')
    (run / "bad_files.jsonl").write_text('{"path": "a.jpg"}\n{"path": "b')
    page = page_of(run)
    assert "metrics.jsonl: 3 line(s) are damaged" in page.texts and "environment.json is damaged" in page.texts
    assert "1 image(s) could not be read" in page.texts
    steps, values = page.curves["loss", "loss"]
    assert steps.tolist() == [*range(100, 1000, 100), 1100] and np.isnan(values[-1])
    assert np.allclose(values[:-1], 7 - np.arange(100, 1000, 100) / 900)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "-3", "0", "x", "[1, 2]", "{3: 4}", "null"])
def test_settings_that_are_damaged(tmp_path: Path, value: str):
    run = fake_run(tmp_path / "run")
    (run / "report").mkdir(exist_ok=True)
    (run / "report" / "starts.jsonl").write_text('{"step": Infinity}\n{"step": NaN}\n{"step": 300}\n')
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in ("steps", "images", "epochs", "batch_size", "terms"):  # one more at a time
        config[key] = yaml.safe_load(value)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        found = folder.read_run(run)
        assert found.starts == [300] and folder.changed(found)
    page = page_of(run)
    assert page.curves["loss", "loss"][0].tolist() == [*range(100, 1001, 100)]
    assert not [key for key, _ in page.curves if key.startswith("schedule/")]


def test_little_to_say(tmp_path: Path):
    """Before the first line, without evaluations, and of a version that nobody knows."""
    run = fake_run(tmp_path / "run", [])
    page = page_of(run)
    assert not page.curves and "no verdict" in page.texts and "Scores" not in page.texts
    (run / "metrics.jsonl").unlink()
    assert "Run it again" in page_of(run).texts
    (run / "config.yaml").write_text("future: {setting: 1}\nterms: {unheard_of: {}}\nsteps: many\nbatch_size: [1]\n")
    assert "future.setting" in page_of(run).texts
    (run / "config.yaml").write_text("[]")
    assert "config.yaml is damaged" in page_of(run).texts


def test_what_ran(tmp_path: Path):
    run = fake_run(tmp_path / "run", seed=7)
    (run / "evaluations").mkdir()
    row = {"k": 20, "top1": 71.234, "top1_interval": [68.1, 74.2], "top5": None}
    result = {"evaluator": "knn", "model": "m", "results": [row],
              "train": {"data": "A", "images": 10_000}, "test": {"data": "B", "images": 1000},
              "seconds": 3.2}  # fmt: skip
    (run / "evaluations/knn.json").write_text(json.dumps(result))
    rows = {key: (value, default) for key, value, default in folder.changed(folder.read_run(run))}
    assert rows["seed"] == (7, 0) and rows["optim.lr"] == (2e-3, 5e-4) and rows["epochs"] == (12.0, None)
    assert rows["model_args.depth"] == (4, None) and "optim.min_lr" not in rows and "steps" not in rows
    text = page_of(run).texts
    assert (
        "71.23 (68.10 to 74.20)" in text
        and "top-1 %" in text
        and "learnt on 10,000 images of A; judged on 1,000 images of B; 3 s" in text
    )
    assert f"dino-sd train {run / 'config.yaml'} out={run}_again" in text
    assert "dino-sd train 'x y.yaml'" in text and "torch==2.14.1" in text
    assert "learning" in text and "warming up until step 200, then learning until step 1,000" in text
    assert "53% of 1,872" in text and "70.0 %" in text and "from 60.0 %" in text


def test_several_runs(tmp_path: Path):
    runs = [fake_run(tmp_path / "a" / "run", optim__lr=1e-3), fake_run(tmp_path / "b" / "run", optim__lr=4e-3)]
    page = page_of(*runs)
    names = {name for key, name in page.curves if key == "loss"}
    assert names == {"a/run", "b/run"}
    compared = page.texts[page.texts.index("What differs between the runs") : page.texts.index("settings that differ")]
    assert "optim.lr0.0010.004" in compared and "batch_size" not in compared
    assert {name for key, name in page.curves if key == "knn"} == {"a/run", "b/run"}


def test_long_curves_keep_their_peaks(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=50_000)
    values[[12_345, 40_000]] = 99.0, -99.0
    thin = curve(list(range(50_000)), values.tolist())
    assert thin.thinned and len(thin.steps) <= charts.MOST_POINTS + 2
    assert 12_345 in thin.steps and 40_000 in thin.steps and {0, 49_999} <= {*thin.steps.tolist()}
    assert np.array_equal(thin.values, values[thin.steps])
    short = curve([1, 2], [3.0, float("inf")])
    assert not short.thinned and np.isnan(short.values[1])
    lines = [{"step": s, **{f"{k}/loss": v + k for k in range(12)}} for s, v in enumerate(values[:8000].tolist())]
    assert len(page_of(fake_run(tmp_path / "run", lines)).html) < 5_000_000


def test_every_number_has_its_place():
    keys = ["step", "epoch", "loss", "labels/accuracy", "exit_3/accuracy", "accuracy", "dino/kl", "surprise", "x/y"]
    groups = charts_of(keys)
    placed = {key: chart.title for _, _, found in groups for chart, labels in found for key in labels}
    assert placed == {
        "loss": "Loss", "labels/accuracy": "Accuracy on training crops", "exit_3/accuracy": "Accuracy",
        "accuracy": "Accuracy", "dino/kl": "Loss taken apart", "surprise": "surprise", "x/y": "x/y",
    }  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width, height, dark", [(390, 844, False), (1280, 900, True)])
def test_in_a_browser(trained: Path, width: int, height: int, dark: bool):
    """No error, no request, nothing wider than the screen; scales, lines and steps can be switched."""
    first = "document.querySelector('figure:has(.scale):has(.legend)')"
    shown = f"[...{first}.querySelectorAll('.plot')].map((plot) => plot.hidden)"
    lines = "Bokeh.documents[0].roots().flatMap((f) => f.renderers).filter((r) => !r.visible).length"
    moments = "[...document.querySelectorAll('.moment')].map((moment) => moment.hidden)"
    seen = visit(
        trained / "report.html", width, height, dark=dark, touch=width < 500,
        scripts=(
            "document.documentElement.scrollWidth", "Bokeh.documents[0].roots().length",
            shown, f"{first}.querySelector('.scale').click(), {shown}",
            f"{first}.querySelector('.legend button').click(), {lines} > 0",
            moments, f"document.querySelector('.steps button').click(), {moments}",
            "getComputedStyle(document.body).backgroundColor",
            "document.querySelectorAll('.plot .bk-Figure').length",
        ),
    )  # fmt: skip
    assert not seen.problems and not seen.requests
    wide, figures, before, after, hidden, newest, oldest, background, drawn = seen.found
    assert wide <= width and figures == drawn > 10
    assert sorted(before) == [False, True] and after == [not each for each in before] and hidden
    assert newest == [True, True, False] and oldest == [False, True, True]
    assert background == ("rgb(18, 20, 23)" if dark else "rgb(246, 246, 244)")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_bad_names_in_a_browser(tmp_path: Path):
    """Also where the pointer makes the charts say them."""
    out = tmp_path / "page.html"
    report([evil_run(tmp_path), fake_run(tmp_path / QUOTED)], ReportSettings(out=str(out), pictures=False))
    seen = visit(out, 1280, 900, hover=".plot:not([hidden])", scripts=("String(window.hacked)",))
    assert not seen.problems and not seen.requests and seen.found == ["undefined"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_charts_follow_the_system_from_light_to_dark(tmp_path: Path):
    page_of(fake_run(tmp_path / "run"))
    pictures = []
    for dark, dawn in ((True, False), (False, True), (False, False)):
        picture = tmp_path / "page.png"
        to_charts = "void document.querySelector('.charts').scrollIntoView({behavior: 'instant'})"
        visit(tmp_path / "page.html", 900, 600, dark=dark, dawn=dawn, picture=picture, scripts=(to_charts,))
        pictures.append(np.array(Image.open(picture).convert("RGB")))
    assert np.array_equal(pictures[0], pictures[1])
    assert pictures[0].mean() < 60 and pictures[2].mean() > 200
