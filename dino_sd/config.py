"""The settings of a run and of what is done with it: typed trees. They know no objects; build.py makes those."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from dino_sd.settings import Curve, Duration, Probabilities, Probability, Settings, Size, as_list, between


class GlobalCrops(Settings):
    count: int = Field(default=2, ge=1, description="global crops an image")
    size: Size = Field(default=224, description="side in pixels, or [height, width]")
    scale: tuple[float, float] = Field(default=(0.4, 1.0), description="share of the image's area that a crop covers")
    blur: Probabilities = Field(default=[1.0, 0.1], description="probability of blur, one a crop; the last is repeated")
    solarize: Probabilities = Field(default=[0.0, 0.2], description="probability of solarising, one a crop; likewise")


class LocalCrops(Settings):
    count: int = Field(default=8, ge=0, description="local crops an image; 0 turns them off")
    size: Size = Field(default=96, description="side in pixels, or [height, width]")
    scale: tuple[float, float] = Field(default=(0.05, 0.4), description="share of the image's area that a crop covers")
    blur: Probabilities = Field(default=[0.5], description="probability of blur, one a crop; the last is repeated")
    solarize: Probabilities = Field(default=[0.0], description="probability of solarising, one a crop; likewise")


class Jitter(Settings):
    probability: Probability = Field(default=0.8, description="share of crops whose colours are jittered")
    brightness: float = Field(default=0.4, ge=0, le=1, description="factor drawn from 1 - x to 1 + x")
    contrast: float = Field(default=0.4, ge=0, le=1, description="factor drawn from 1 - x to 1 + x")
    saturation: float = Field(
        default=0.2, ge=0, le=1, description="factor drawn from 1 - x to 1 + x; three channels only"
    )
    hue: float = Field(default=0.1, ge=0, le=0.5, description="shift drawn from -x to x of a turn; three channels only")


class Views(Settings):
    global_: GlobalCrops = Field(default_factory=lambda: GlobalCrops(), alias="global")
    local: LocalCrops = Field(default_factory=lambda: LocalCrops())
    ratio: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="width / height of a crop before it is resized"
    )
    flip: Probability = Field(default=0.5, description="probability of a horizontal flip")
    jitter: Jitter = Field(default_factory=lambda: Jitter())
    grayscale: Probability = Field(default=0.2, description="share of crops made gray; three channels only")
    blur_sigma: tuple[float, float] = Field(
        default=(0.1, 2.0), description="standard deviation of the blur, pixels, from - to"
    )
    clean_crop: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the side that the centre crop of a clean image keeps (consistency)",
    )
    randaugment: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0, le=30)]] | None = Field(
        default=None, description="RandAugment of every crop, [operations, magnitude of 0 to 30]; null: off"
    )
    mixup: float = Field(default=0.0, ge=0, description="alpha of mixup, for training with labels; 0: off")
    cutmix: float = Field(
        default=0.0, ge=0, description="alpha of cutmix; with mixup, one of the two for each batch; 0: off"
    )
    mean: list[float] | None = Field(
        default=None, description="per channel, pixels from 0 to 1; null: measured on the data"
    )
    std: list[float] | None = Field(
        default=None, description="per channel, pixels from 0 to 1; null: measured on the data"
    )
    range: tuple[float, float] | None = Field(
        default=None,
        description="what is black and white to colour operations, as shares of the largest number that pixels can be, "
        "or as it is of floats; null: 0 to 1 of bytes, measured for 16 bits and floats",
    )


class Teacher(Settings):
    momentum: Annotated[Curve, between(0, 1)] = Field(
        default_factory=lambda: Curve(start=0.996, end=1.0), description="share of the teacher kept at each step"
    )
    init: str | None = Field(
        default=None,
        description="a teacher of its own that does not move: a run, a checkpoint, an export or timm:NAME; "
        "null: a copy of the student that follows it",
    )

    @model_validator(mode="after")
    def _frozen(self) -> "Teacher":
        if self.init is not None:
            if "momentum" in self.model_fields_set and (self.momentum.start, self.momentum.end) != (1, 1):
                raise ValueError(f"teacher.init={self.init} does not move: leave teacher.momentum out")
            self.momentum = Curve(start=1, end=1)
        return self


class Optim(Settings):
    name: Literal["adamw", "sgd", "lars"] = Field(default="adamw", description="sgd and lars use momentum 0.9")
    lr: float = Field(
        default=5e-4, gt=0, description="peak learning rate for 256 images a step; scaled by batch_size / 256"
    )
    min_lr: float = Field(default=1e-6, ge=0, description="learning rate at the end; not scaled")
    warmup: Duration = Field(default=0.1, description="linear warm-up of the learning rate; duration")
    weight_decay: Annotated[Curve, between(0)] = Field(
        default_factory=lambda: Curve(start=0.04, end=0.4), description="not applied to biases and 1-d parameters"
    )
    clip: float | None = Field(
        default=3.0, gt=0, description="largest gradient norm of each parameter by itself; null: off"
    )


class Evaluate(Settings):
    every: Duration | None = Field(
        default=None, description="accuracy on `test` this often, and before the first step; duration"
    )
    train: str | None = Field(default=None, description="labelled set that votes in k-NN: DATA")
    test: str | None = Field(default=None, description="labelled set that is judged: DATA")
    k: int = Field(default=20, ge=1, description="neighbours that vote")
    temperature: float = Field(default=0.07, gt=0, description="a vote weighs exp(similarity / temperature)")
    size: Size | None = Field(default=None, description="side of evaluation images in pixels; null: the global crops'")
    crop: float = Field(
        default=0.875, gt=0, le=1, description="share of the resized image's side that the centre crop keeps"
    )
    batch_size: int = Field(default=256, ge=1, description="images at a time")

    @model_validator(mode="after")
    def _sets(self) -> "Evaluate":
        if self.every is not None and self.test is None:
            raise ValueError("evaluate.every needs labelled sets: set evaluate.test, and evaluate.train for k-NN")
        return self


class Checkpoint(Settings):
    every: Duration = Field(default=0.05, description="save this often; duration")
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay")
    milestone: Duration | None = Field(default=None, description="checkpoints this far apart stay for good; duration")
    best: str | None = Field(
        default=None, description="a metric, such as knn or feature_spread, whose best checkpoint stays; null: none"
    )
    on_error: Literal["warn", "stop"] = Field(
        default="warn", description="when one cannot be written: go on and try again at the next, or stop"
    )


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare `off` as false


class Log(Settings):
    every: int = Field(
        default=50, ge=1, description="steps between two lines of metrics.jsonl (means over these steps)"
    )
    wandb: Annotated[Literal["off", "online", "offline"], BeforeValidator(_off)] = Field(
        default="off", description="send the metrics to Weights & Biases too"
    )


class Health(Settings):
    every: int = Field(default=50, ge=1, description="steps between two judgements of whether the run learns")
    on_collapse: Literal["warn", "stop"] = Field(
        default="warn", description="say that the run has collapsed, or end it (exit code 3)"
    )


class Report(Settings):
    every: Duration | None = Field(
        default=0.25,
        description="draw a few images as the network sees them, and write report.html, this often and at the end; "
        "needs the extra `report`; duration; null: never",
    )


class Data(Settings):
    """`data=X` alone is `data.source=X`."""

    shorthand: ClassVar[str | None] = "source"

    source: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(as_list), Field(min_length=1)] = Field(
        default=["fashion-mnist-mini:train"], description="images to train on: DATA, or a list of several"
    )
    weights: list[Annotated[float, Field(gt=0, le=1000)]] | None = Field(
        default=None, description="how often an image of each of several sources comes in an epoch; null: once"
    )
    cache: str | None = Field(
        default=None, description="folder for raw copies: images decoded once, read from there ever after; null: none"
    )
    cache_side: int = Field(
        default=384, ge=1, description="longest shorter side of the raw copies, in pixels; larger images are resized"
    )
    memory: float = Field(
        default=1e9, ge=0, description="small images of one size are decoded once into memory, up to this many bytes"
    )
    most_bad: Probability = Field(
        default=0.1, description="share of the images that may be unreadable; others stand in for those"
    )

    @model_validator(mode="after")
    def _one_weight_each(self) -> "Data":
        if self.weights is not None and len(self.weights) != len(self.source):
            raise ValueError(f"data.weights={self.weights}: expected one for each of {len(self.source)} source(s)")
        return self

    def __str__(self) -> str:
        return self.source[0] if len(self.source) == 1 else f"[{', '.join(self.source)}]"


class Config(Settings):
    model: str = Field(default="vit_small_patch16_224", description="any timm model name")
    model_args: dict[str, Any] = Field(default={}, description="passed on to timm.create_model")
    channels: int = Field(
        default=3, ge=1, description="1: images are read as gray; 3: as RGB; others: as many as the files hold"
    )
    drop_path: float = Field(default=0.1, ge=0, lt=1, description="stochastic depth of the student")
    init: str | None = Field(
        default=None, description="start from these weights: timm:NAME, a run, a checkpoint or an export"
    )
    data: Data = Field(default_factory=lambda: Data())
    labelled: float = Field(
        default=1.0, gt=0, le=1, description="share of each class's images whose label is used; the rest has none"
    )
    labelled_seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="draws which labels those are; null: the seed"
    )
    oversample: int = Field(
        default=1, ge=1, description="times that a labelled image comes in an epoch where others have no label"
    )
    out: str = Field(default="runs/dino", description="folder of the run")
    seed: int = Field(default=0, ge=0, lt=2**63, description="every random number of the run derives from it")
    epochs: float | None = Field(default=None, gt=0, description="length of the run in passes over the data")
    steps: int | None = Field(default=None, gt=0, description="length of the run in optimizer steps")
    images: float | None = Field(default=None, gt=0, description="length of the run in images seen")
    batch_size: int = Field(default=512, ge=1, description="images a step, over all ranks and accumulated parts")
    accumulate: int = Field(
        default=1, ge=1, description="parts that a step's batch is worked through in, to save memory"
    )
    views: Views = Field(default_factory=lambda: Views())
    terms: dict[str, Any] = Field(default={"dino": {}}, description="summands of the loss: file names in dino_sd/terms")
    teacher: Teacher = Field(default_factory=lambda: Teacher())
    optim: Optim = Field(default_factory=lambda: Optim())
    precision: Literal["bf16", "fp32", "fp64"] = Field(
        default="bf16", description="of the networks; losses are never in bf16"
    )
    compile: bool = Field(default=False, description="torch.compile the backbones")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where to train")
    timeout: float = Field(default=600, gt=0, description="seconds that ranks wait for one that does not answer")
    most_skipped: int = Field(
        default=10,
        ge=1,
        description="steps in a row with numbers that are not finite; then the run goes back to its newest checkpoint "
        "with half the learning rate, and stops the second time",
    )
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="loader processes a rank"
    )
    evaluate: Evaluate = Field(default_factory=lambda: Evaluate())
    checkpoint: Checkpoint = Field(default_factory=lambda: Checkpoint())
    log: Log = Field(default_factory=lambda: Log())
    health: Health = Field(default_factory=lambda: Health())
    report: Report = Field(default_factory=lambda: Report())

    @model_validator(mode="after")
    def _cross_checks(self) -> "Config":
        lengths = [name for name in ("epochs", "steps", "images") if getattr(self, name) is not None]
        if len(lengths) != 1:
            found = f"found {' and '.join(lengths)}" if lengths else "found none"
            raise ValueError(f"set exactly one of epochs, steps, images as the length of the run; {found}")
        for name, crops in (("global", self.views.global_), ("local", self.views.local)):
            low, high = crops.scale
            if not 0 < low <= high <= 1:
                raise ValueError(f"views.{name}.scale=[{low}, {high}]: expected 0 < from <= to <= 1")
        for name in ("mean", "std"):
            values = getattr(self.views, name)
            if values is not None and len(values) != self.channels:
                raise ValueError(f"views.{name} has {len(values)} value(s) but channels={self.channels}")
        if self.views.std is not None and min(self.views.std) <= 0:
            raise ValueError(f"views.std={self.views.std}: expected values above 0")
        if self.views.range is not None and self.views.range[0] >= self.views.range[1]:
            raise ValueError(f"views.range={list(self.views.range)}: expected from < to")
        if self.views.randaugment is not None and self.channels not in (1, 3):
            raise ValueError(
                f"views.randaugment is for gray and RGB images, not for channels={self.channels}; turn it off"
            )
        for name in ("ratio", "blur_sigma"):
            low, high = getattr(self.views, name)
            if not 0 < low <= high:
                raise ValueError(f"views.{name}=[{low}, {high}]: expected 0 < from <= to")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")
        return self


class GenerationsSettings(Settings):
    """A chain of born-again runs."""

    generations: int = Field(default=3, ge=1, description="born-again runs after the first, which learns from labels")
    stop_early: bool = Field(default=False, description="stop after a generation that is no better than its parent")


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class ExportSettings(Settings):
    out: str = Field(description="folder of the export")
    format: Annotated[list[str], BeforeValidator(_split), Field(min_length=1)] = Field(
        default=["timm"],
        description="one or several, with commas between: timm (also for transformers and torch.hub), torchvision "
        "(ResNets), onnx (extra: onnx), pt2 (torch.export), safetensors (the weights alone)",
    )
    network: Literal["teacher", "student"] | None = Field(
        default=None, description="of a checkpoint; null: the run's result"
    )
    exit: int | None = Field(default=None, ge=1, description="the shallow network up to this block or stage alone")
    dynamic_size: bool = Field(default=False, description="onnx, pt2: height and width are free, as the batch is")
    preprocess: bool = Field(
        default=False, description="onnx, pt2: takes uint8 pixels of the right size; mean and std are in the graph"
    )


class InspectSettings(Settings):
    """A look at a set of images."""

    channels: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="1: images are read as gray; 3: as RGB; null: as most of a few images have"
    )
    limit: int = Field(default=20_000, ge=0, description="images looked at, evenly spaced over the set; 0: all")
    near: int = Field(
        default=3, ge=0, le=16, description="bits of 64 in which the hashes of near duplicates may differ"
    )
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="processes that look at images"
    )
    out: str | None = Field(default="inspect.png", description="picture of the set; null: none")


class LookSettings(Settings):
    """What every picture of a model takes."""

    network: Literal["teacher", "student"] | None = Field(
        default=None, description="of a checkpoint; null: the run's result"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where to compute")


class AttentionSettings(LookSettings):
    """What the class token of a ViT attends to."""

    out: str = Field(default="attention", description="folder of the pictures, one an image")
    size: int | None = Field(
        default=None, ge=1, description="shorter side in pixels as the model sees it; null: what the model expects"
    )
    layer: int = Field(default=-1, description="block, counted from 0; negative from the end")
    mass: float = Field(default=0.6, gt=0, le=1, description="share of the attention that is encircled")
    heads: bool = Field(default=True, description="every head beside their mean")
    limit: int = Field(
        default=100, ge=0, description="images of a set, evenly spaced, or first frames of a video; 0: all"
    )
    frames: bool = Field(default=False, description="the images of a folder are frames of a video, ordered by name")
    every: int = Field(default=1, ge=1, description="of videos, one frame in so many")
    fps: float | None = Field(default=None, gt=0, description="of videos, frames a second; null: as they are, or 10")
    format: Literal["auto", "gif", "mp4"] = Field(
        default="auto", description="of videos; auto: mp4 (extra: video) for video files, gif for others"
    )


class PcaSettings(LookSettings):
    """Components of patches as colours."""

    out: str = Field(default="pca", description="folder of the pictures: one an image, and pca.png with all of them")
    size: int | None = Field(
        default=None, ge=1, description="shorter side in pixels as the model sees it; null: what the model expects"
    )
    layer: int | None = Field(default=None, description="block or stage, counted from 0; null: the model's output")
    limit: int = Field(default=32, ge=0, description="images of each set, evenly spaced; 0: all")


class SetSettings(LookSettings):
    """What every picture of a whole set takes."""

    batch_size: int = Field(default=256, ge=1, description="images at a time")
    precision: Literal["bf16", "fp32"] = Field(default="fp32", description="of the backbone")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="loader processes a rank"
    )
    limit: int = Field(default=0, ge=0, description="images of the set that are taken, evenly spaced; 0: all")


class NeighboursSettings(SetSettings):
    """Images and what is nearest to them."""

    exit: int | None = Field(default=None, ge=1, description="the shallow network up to this block or stage, from 1")
    out: str = Field(default="neighbours.png", description="picture file")
    images: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(as_list)] | None = Field(
        default=None, description="numbers of the images whose neighbours are shown, from 0; null: evenly spaced ones"
    )
    count: int = Field(default=10, ge=1, description="how many evenly spaced ones")
    k: int = Field(default=8, ge=1, description="neighbours of each")


class MapSettings(SetSettings):
    """A set as a plane."""

    exit: int | None = Field(default=None, ge=1, description="the shallow network up to this block or stage, from 1")
    out: str = Field(default="map.png", description="picture file")
    method: Literal["auto", "umap", "pca"] = Field(
        default="auto", description="umap (extra: umap) or pca; auto: umap where it is installed"
    )
    seed: int = Field(default=0, ge=0, description="of UMAP")
    limit: int = Field(default=10_000, ge=0, description="images of the set that are taken, evenly spaced; 0: all")
    coordinates: str | None = Field(
        default=None, description="file of the places too: .csv or .json with index, path, x, y, label"
    )


class PrototypesSettings(SetSettings):
    """Prototypes that are used most."""

    out: str = Field(default="prototypes.png", description="picture file")
    count: int = Field(default=16, ge=1, description="prototypes that are shown, the most used first")
    images: int = Field(default=10, ge=1, description="images of each")


class ReportSettings(Settings):
    """A page of one run or several."""

    out: str | None = Field(
        default=None, description="HTML file; null: report.html in the run's folder, of several runs in this one"
    )
    pictures: bool = Field(
        default=True, description="draw those of the newest checkpoint where the folder has none; needs the run's data"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where to compute those")
