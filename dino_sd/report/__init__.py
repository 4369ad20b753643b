"""`dino-sd report`: what is in the folders of runs, on one page that can be sent around."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from dino_sd import build, checkpoint, recipe
from dino_sd.config import ReportSettings
from dino_sd.distributed import say, setup
from dino_sd.errors import UserError
from dino_sd.loading import load_model
from dino_sd.report.drawing import FixedImages
from dino_sd.report.folder import Run, name_apart, read_run
from dino_sd.report.page import page
from dino_sd.tables import write_text

EXTRA = "'dino-sd[report]'"


def has_extra() -> bool:
    return importlib.util.find_spec("bokeh") is not None


def report(folders: Sequence[str | Path], settings: ReportSettings) -> Path:
    """Writes one page about the runs in these folders; returns its path.

    Where a folder has no pictures of its newest checkpoint, they are drawn if model and data can be had. Raises
    UserError for folders that hold no run, without the extra, and where the page cannot be written.
    """
    if not has_extra():
        raise UserError(f"report: its charts need bokeh; install the extra: pip install {EXTRA}")
    paths = [Path(folder) for folder in folders]
    runs = [read_run(path) for path in paths]
    notes = {}
    if settings.pictures:
        for run in runs:
            try:
                _draw_newest(run, settings.device)
            except (UserError, OSError) as error:
                notes[run.folder] = f"the pictures of its newest checkpoint could not be drawn: {error}"
                say(f"{run.folder}: {notes[run.folder]}")
    out = Path(settings.out) if settings.out else paths[0] / "report.html" if len(paths) == 1 else Path("report.html")
    write(paths, out, notes)
    return out


def write(folders: Sequence[Path], out: Path, notes: dict[Path, str] | None = None) -> None:
    """The page as it follows from what the folders hold. notes: what else is to be said of a run. Errors: `report`."""
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        run.notes += [notes[run.folder]] if notes and run.folder in notes else []
    name_apart(runs)
    write_text(out, page(runs))


def _draw_newest(run: Run, device: str) -> None:
    """Raises UserError where the checkpoint, the config or the data cannot be had, OSError where nothing is written."""
    newest = checkpoint.newest(run.folder)
    if newest is None or checkpoint.step_of(newest) in run.pictures:
        return
    model = load_model(newest, setup(device))
    cfg = recipe.load_config(run.folder / "config.yaml", [])
    images = FixedImages(build.open_data(cfg, decoded=False), cfg, model.provenance["data"]["range"])
    images.draw(model, run.folder / "report", checkpoint.step_of(newest))
