"""The commands. Each unpacks its arguments, calls one function, and knows nothing more."""

import importlib
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dino_sd.distributed import adopt_slurm, is_main, is_of_others, rank, say, shutdown, silent_ranks, world_size
from dino_sd.errors import Halted, Interrupted, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Self-distillation for vision: pretrain backbones on your own images, judge them, take them elsewhere.",
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench_app, name="bench")

PAIRS = typer.Argument(metavar="[KEY=VALUE]...", help="settings; --help lists them all")
DATA = (
    "DATA is a folder of images at any depth (class folders give labels), a pattern ('/data/**/*.jpg'), a list (.txt, "
    ".csv: path[,label]), .tar or .zip archives (also 'shard-{000..123}.tar'), .parquet files or a folder that Hugging "
    "Face datasets saved (extra: parquet), torchvision:NAME:SPLIT, fashion-mnist:train|test, or "
    "fashion-mnist-mini:train|test (ships with the package). Several: 'data=[A,B]' 'data.weights=[1,2]'."
)
MODEL = (
    "MODEL is a run folder, a checkpoint, an export or other folder in timm's format, a file of weights as DINO and "
    "DINOv2 were published (x.pth, or 'x.pth,num_heads=2' for what it does not say of itself), timm:NAME, or `pixels` "
    "for the raw images as a baseline."
)


def settings_table(rows: list[tuple[str, Any]], title: str) -> None:
    """Every setting with its default and what it is."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("setting", "default", "what it is"):
        table.add_column(column, overflow="fold")
    for key, field in rows:
        default = field.get_default(call_default_factory=True)
        if hasattr(default, "model_dump"):
            values = default.model_dump(exclude_defaults=False)
            constant = values["start"] == values["end"]
            default = values["start"] if constant else {k: values[k] for k in ("start", "end", "shape")}
        shown = "(needed)" if field.is_required() else "null" if default is None else str(default)
        table.add_row(key, shown, field.description or "")
    Console(width=max(Console().width, 100), markup=False, emoji=False).print(table)


def help_option(title: str, rows: Any) -> Any:
    """A --help that adds the settings to typer's own text."""

    def show(context: typer.Context, wanted: bool) -> None:
        if wanted:
            typer.echo(context.get_help())
            settings_table(list(rows()), title)
            raise typer.Exit

    return typer.Option("--help", is_eager=True, callback=show, help="Show this text and every setting.")


def train_settings() -> Any:
    from dino_sd.config import Config
    from dino_sd.recipe import term_settings
    from dino_sd.settings import fields

    return fields(Config, term_settings({"dino": {}}))


def class_settings(name: str) -> Any:
    from dino_sd import config, evaluator_config
    from dino_sd.settings import fields

    return fields(getattr(config, name, None) or getattr(evaluator_config, name), {})


DURATIONS = (
    "\nSettings of train. A duration is a share of the run (0.1) or epochs=N, steps=N, images=N. A value that moves "
    "(default {start, end, shape}) also takes over and change, or a bare number as a constant."
)
TrainHelp = Annotated[bool, help_option(DURATIONS, train_settings)]


@app.command(add_help_option=False, epilog=DATA)
def train(config: str, pairs: Annotated[list[str] | None, PAIRS] = None, help: TrainHelp = False) -> None:
    """Train from a YAML file or the name of a recipe; goes on by itself where `out` holds an unfinished run."""
    from dino_sd.recipe import load_config
    from dino_sd.train import train as run

    saved = run(load_config(config, pairs or []))
    if is_main():
        print(saved)


@app.command(add_help_option=False, epilog=DATA)
def generations(
    config: str,
    pairs: Annotated[list[str] | None, PAIRS] = None,
    help: Annotated[
        bool, help_option("\nSettings beside those of train.", lambda: class_settings("GenerationsSettings"))
    ] = False,
) -> None:
    """Train born-again networks one after the other: dino-sd generations born_again generations=3."""
    from dino_sd.config import GenerationsSettings
    from dino_sd.generations import generations as run
    from dino_sd.recipe import load_config

    own = tuple(f"{name}=" for name in GenerationsSettings.model_fields)
    chain = [pair for pair in pairs or [] if pair.startswith(own)]
    run(load_config(config, [pair for pair in pairs or [] if pair not in chain]), settings(GenerationsSettings, chain))


@app.command(add_help_option=False, epilog=DATA)
def plan(config: str, pairs: Annotated[list[str] | None, PAIRS] = None, help: TrainHelp = False) -> None:
    """Say what `train` would do and what it needs, and do none of it."""
    from dino_sd.plan import plan as show
    from dino_sd.recipe import load_config

    show(load_config(config, pairs or []))


@app.command(epilog="Settings are those of train; see `dino-sd train --help`.")
def quickstart(pairs: Annotated[list[str] | None, PAIRS] = None) -> None:
    """Pretrain, evaluate and export on the images that come with the package: a few minutes on a CPU."""
    from dino_sd.quickstart import quickstart as run

    run(pairs or [])


@app.command(add_help_option=False, epilog=MODEL)
def export(
    model: str,
    pairs: Annotated[list[str] | None, PAIRS] = None,
    help: Annotated[bool, help_option("\nSettings of export.", lambda: class_settings("ExportSettings"))] = False,
) -> None:
    """Write the backbone for other tools: dino-sd export MODEL out=DIR format=timm,onnx."""
    from dino_sd.config import ExportSettings
    from dino_sd.export import export as run

    chosen = settings(ExportSettings, pairs)
    run(
        model, chosen.out, chosen.format, chosen.network, chosen.exit, chosen.dynamic_size, chosen.preprocess
    )  # fmt: skip


JSON = typer.Option("--json", help="print one JSON object on stdout and nothing else there")


@app.command(add_help_option=False)
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN... [KEY=VALUE]...", help="folders of runs, and settings")],
    help: Annotated[bool, help_option("\nSettings of report.", lambda: class_settings("ReportSettings"))] = False,
) -> None:
    """One page of a run, or of several side by side, to be opened anywhere: dino-sd report RUN [RUN ...]."""
    from dino_sd.config import ReportSettings
    from dino_sd.report import report as write

    pairs = [argument for argument in runs if "=" in argument and not Path(argument).exists()]
    folders = [argument for argument in runs if argument not in pairs]
    if not folders:
        raise UserError("report: expected the folder of a run, such as `dino-sd report runs/dino`")
    print(write(folders, settings(ReportSettings, pairs)))


@app.command(add_help_option=False, epilog=DATA)
def inspect(
    data: str,
    pairs: Annotated[list[str] | None, PAIRS] = None,
    json: Annotated[bool, JSON] = False,
    help: Annotated[bool, help_option("\nSettings of inspect.", lambda: class_settings("InspectSettings"))] = False,
) -> None:
    """Say what is in a set of images, what is wrong with it, and which settings fit it: dino-sd inspect DATA."""
    from dino_sd.config import InspectSettings
    from dino_sd.inspection import inspect as run

    run(data, settings(InspectSettings, pairs), json_only=json)


@app.command(epilog=f"Settings are those of train; see `dino-sd train --help`.\n\n{DATA}")
def views(
    data: str,
    pairs: Annotated[list[str] | None, PAIRS] = None,
    images: Annotated[int, typer.Option(min=1, help="images whose crops are shown")] = 8,
    epoch: Annotated[int, typer.Option(min=0, help="epoch whose first images are shown, from 0")] = 0,
    out: Annotated[Path, typer.Option(help="picture file")] = Path("views.png"),
) -> None:
    """Draw the very crops that train would see: dino-sd views DATA config=own_images."""
    from dino_sd.sheets import views as run

    print(run(data, pairs or [], images, epoch, out))


EVALUATORS = {  # name: (the module that has its function, help)
    "knn": ("evaluate", "Weighted k-NN of a frozen backbone: dino-sd knn MODEL train=DATA test=DATA."),
    "linear": ("evaluate", "Linear probe on a frozen backbone: dino-sd linear MODEL train=DATA test=DATA."),
    "logistic": (
        "evaluate",
        "Logistic regression on frozen features: dino-sd logistic MODEL train=DATA test=DATA share=0.01,0.1,1.",
    ),
    "retrieval": ("evaluate", "Are the nearest images of the same class? dino-sd retrieval MODEL test=DATA."),
    "segmentation": (
        "segment", "Classes of pixels from frozen patches: dino-sd segmentation MODEL train=FOLDER test=FOLDER."
    ),
    "ranks": ("evaluate", "How features fill their space, without labels: dino-sd ranks MODEL test=DATA."),
}  # fmt: skip


def add_evaluator(name: str, module: str, text: str) -> None:
    """One command for each: they differ in their settings alone."""
    cls = f"{name.capitalize()}Settings"

    def command(
        model: str,
        pairs: Annotated[list[str] | None, PAIRS] = None,
        json: Annotated[bool, JSON] = False,
        help: Annotated[bool, help_option(f"\nSettings of {name}.", lambda: class_settings(cls))] = False,
    ) -> None:
        from dino_sd import evaluator_config

        run = getattr(importlib.import_module(f"dino_sd.{module}"), f"evaluate_{name}")
        run(model, settings(getattr(evaluator_config, cls), pairs), json_only=json)

    app.command(name, add_help_option=False, help=text, epilog=f"{MODEL}\n\n{DATA}")(command)


for name, (module, text) in EVALUATORS.items():
    add_evaluator(name, module, text)


def evaluate_settings() -> Any:
    shared = dict(class_settings("FrozenSettings"))
    suite = [(key, field) for key, field in class_settings("SuiteSettings") if key not in shared]
    return [*class_settings("AccuracySettings"), *suite]


@app.command(add_help_option=False, epilog=f"{MODEL}\n\n{DATA}")
def evaluate(
    model: str,
    pairs: Annotated[list[str] | None, PAIRS] = None,
    json: Annotated[bool, JSON] = False,
    help: Annotated[
        bool, help_option("\nSettings of evaluate with test=, then those that suite= adds.", evaluate_settings)
    ] = False,
) -> None:
    """Run a list of evaluators: dino-sd evaluate MODEL suite=FILE.

    Or, of a model trained with labels, its accuracy, that of its exits and of all together: evaluate MODEL test=DATA.
    """
    from dino_sd.evaluate import evaluate_accuracy
    from dino_sd.evaluator_config import AccuracySettings, SuiteSettings
    from dino_sd.suite import evaluate_suite

    if any(pair.startswith("suite=") for pair in pairs or []):
        evaluate_suite(model, settings(SuiteSettings, pairs), json_only=json)
    else:
        evaluate_accuracy(model, settings(AccuracySettings, pairs), json_only=json)


@app.command(add_help_option=False, epilog=f"{MODEL}\n\n{DATA}")
def embed(
    model: str,
    data: str,
    pairs: Annotated[list[str] | None, PAIRS] = None,
    help: Annotated[bool, help_option("\nSettings of embed.", lambda: class_settings("EmbedSettings"))] = False,
) -> None:
    """Features of a whole set in one file, with names and labels: dino-sd embed MODEL DATA out=features.npz."""
    from dino_sd.embed_files import embed_files
    from dino_sd.evaluator_config import EmbedSettings

    written = embed_files(model, data, settings(EmbedSettings, pairs))
    if is_main():
        print(written)


IMAGES = typer.Argument(metavar="IMAGE... [KEY=VALUE]...", help="images, and settings; --help lists them all")
IMAGE = (
    "IMAGE is a file, a folder or any other DATA. Videos are animated GIFs and WebPs, folders with frames=true, and "
    "with the extra `video` also .mp4, .mov, .avi, .mkv, .webm."
)


@app.command(add_help_option=False, epilog=f"{MODEL}\n\n{IMAGE}\n\n{DATA}")
def attention(
    model: str,
    arguments: Annotated[list[str], IMAGES],
    help: Annotated[bool, help_option("\nSettings of attention.", lambda: class_settings("AttentionSettings"))] = False,
) -> None:
    """Draw what a ViT's class token attends to: dino-sd attention MODEL IMAGE... out=DIR."""
    from dino_sd.config import AttentionSettings
    from dino_sd.looking import attention as run

    images, pairs = images_and_pairs(arguments)
    for path in run(model, images, settings(AttentionSettings, pairs)):
        print(path)


@app.command(add_help_option=False, epilog=f"{MODEL}\n\n{IMAGE}\n\n{DATA}")
def pca(
    model: str,
    arguments: Annotated[list[str], IMAGES],
    help: Annotated[bool, help_option("\nSettings of pca.", lambda: class_settings("PcaSettings"))] = False,
) -> None:
    """Draw the first three components of images' patches as colours: dino-sd pca MODEL IMAGE... out=DIR."""
    from dino_sd.config import PcaSettings
    from dino_sd.looking import pca as run

    images, pairs = images_and_pairs(arguments)
    for path in run(model, images, settings(PcaSettings, pairs)):
        print(path)


@app.command(add_help_option=False, epilog=f"{MODEL}\n\n{DATA}")
def neighbours(
    model: str,
    data: str,
    pairs: Annotated[list[str] | None, PAIRS] = None,
    help: Annotated[
        bool, help_option("\nSettings of neighbours.", lambda: class_settings("NeighboursSettings"))
    ] = False,
) -> None:
    """Draw some images of a set with those nearest to them: dino-sd neighbours MODEL DATA images=[3,14] out=FILE."""
    from dino_sd.config import NeighboursSettings
    from dino_sd.gallery import neighbours as run

    say_where(run(model, data, settings(NeighboursSettings, pairs)))


@app.command("map", add_help_option=False, epilog=f"{MODEL}\n\n{DATA}")
def map_(
    model: str,
    data: str,
    pairs: Annotated[list[str] | None, PAIRS] = None,
    help: Annotated[bool, help_option("\nSettings of map.", lambda: class_settings("MapSettings"))] = False,
) -> None:
    """Draw a set's features on a plane, by UMAP or PCA: dino-sd map MODEL DATA out=FILE."""
    from dino_sd.config import MapSettings
    from dino_sd.gallery import map as run

    say_where(run(model, data, settings(MapSettings, pairs)))


@app.command(add_help_option=False, epilog=f"{MODEL}\n\n{DATA}")
def prototypes(
    model: str,
    data: str,
    pairs: Annotated[list[str] | None, PAIRS] = None,
    help: Annotated[
        bool, help_option("\nSettings of prototypes.", lambda: class_settings("PrototypesSettings"))
    ] = False,
) -> None:
    """Draw the prototypes that a set uses most, with their images: dino-sd prototypes MODEL DATA out=FILE."""
    from dino_sd.config import PrototypesSettings
    from dino_sd.gallery import prototypes as run

    say_where(run(model, data, settings(PrototypesSettings, pairs)))


@bench_app.command("step")
def bench_step(
    pairs: Annotated[list[str] | None, PAIRS] = None,
    steps: Annotated[int, typer.Option(help="steps to time, after three for warming up")] = 5,
    markdown: Annotated[Path | None, typer.Option(help="append the table to this file")] = None,
) -> None:
    """A training step of this code beside one written as the published code does it: images/s, peak memory, MFU."""
    from dino_sd.bench import bench_step as run

    run(pairs or [], steps, markdown)


@bench_app.command("data", epilog=DATA)
def bench_data(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[DATA] [KEY=VALUE]...", help="images, and settings of train")
    ] = None,
    feed: Annotated[float | None, typer.Option(help="images/s that are wanted: how many cores feed them?")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw both kinds of views side by side into this file")] = None,
    cores: Annotated[int, typer.Option(min=1, help="cores to work on")] = 1,
    json: Annotated[bool, JSON] = False,
) -> None:
    """How fast images become views, stage by stage, beside the same recipe of torchvision and Pillow."""
    from dino_sd.bench_data import bench_data as run

    named = [argument for argument in arguments or [] if "=" not in argument]
    if len(named) > 1:
        raise UserError(f"bench data: expected one DATA, found {' and '.join(named)}")
    run(named[0] if named else None, [pair for pair in arguments or [] if "=" in pair], feed, picture, cores, json)


def images_and_pairs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """IMAGE... KEY=VALUE... apart; what lies on disk is an image, whatever its name. Raises UserError without one."""
    images = [argument for argument in arguments if "=" not in argument or os.path.exists(argument)]
    if not images:
        raise UserError("expected one IMAGE or more: files, folders or other DATA; see --help")
    return images, [argument for argument in arguments if argument not in images]


def say_where(path: Path | None) -> None:
    if path is not None:  # None on all ranks but one
        print(path)


def settings(cls: Any, pairs: list[str] | None) -> Any:
    from dino_sd.settings import check_keys, parse, read_pairs

    tree = read_pairs(pairs or [])
    check_keys(tree, cls, "the command line", {})
    return parse(cls, tree)


def main() -> None:
    """Exit codes: 0 done, 2 bad input (one line), 3 stopped by a guard, 75 interrupted and saved, 130 cut off."""
    adopt_slurm()
    code = 0
    try:
        app(standalone_mode=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        if code == 130:
            say("interrupted; a run goes on from its newest checkpoint with the same command")
    except UserError as error:  # on whichever rank: only one of them may have met it
        where = f"rank {rank()}: " if rank() else ""
        print(f"error: {where}{error}", file=sys.stderr, flush=True)
        code = 2
    except Halted as stop:  # every rank comes here; one says why
        say(f"stopped: {stop}")
        code = 3
    except Interrupted as stop:
        say(f"interrupted: {stop}")
        code = 75
    except Exception:
        crash()
    shutdown()
    sys.exit(code)


def crash() -> None:
    """This rank's traceback first, then which ranks do not answer, and out: without waiting for anyone."""
    where = f"rank {rank()} of {world_size()} " if world_size() > 1 else ""
    print(f"{where}failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    if world_size() == 1:
        sys.exit(1)
    for thread in threading.enumerate():  # a save that is on its way is still good
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(timeout=15)
    # Waiting for an answer tells only a rank that others have left alone from one that has left them.
    if is_of_others(sys.exc_info()[1]) and (silent := silent_ranks()):
        numbers = ", ".join(map(str, silent))
        print(f"rank {rank()}: no answer from rank(s) {numbers}: they hang or are gone", file=sys.stderr, flush=True)
    os._exit(1)  # the way out of a process group, or of loader workers, may wait for those who never come
