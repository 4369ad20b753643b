"""The settings of everything that looks at a frozen model: one class for each evaluator, for suites and for embed."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dino_sd.settings import Settings, Size, as_list


def several(value: Any) -> Any:
    """One value, a list, or `1,5,10`."""
    return value.split(",") if isinstance(value, str) else as_list(value)


Counts = Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(several)]
Positive = Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(several), Field(min_length=1)]
Pool = Literal["cls", "mean", "cls+mean"]
POOL = "class token (or the model's own pooling) of each block; mean: of the last block's patches"


class FrozenSettings(Settings):
    """How a frozen model is loaded and fed."""

    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="loader processes a rank"
    )
    precision: Literal["bf16", "fp32"] = Field(default="fp32", description="of the backbone")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where to compute")
    network: Literal["teacher", "student"] | None = Field(
        default=None, description="of a checkpoint; null: the run's result"
    )
    exit: int | None = Field(default=None, ge=1, description="the shallow network up to this block or stage, from 1")
    channels: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="for MODEL `pixels` only: 1 is gray, 3 RGB; null: 3"
    )


class CacheSettings(Settings):
    """What everything takes that needs the same features of whole images again and again."""

    cache: bool = Field(
        default=True, description="keep features in DINO_SD_CACHE (10 GB at most) and use those that are there"
    )


class JudgeSettings(FrozenSettings):
    """What everything takes that judges a frozen model."""

    test: str = Field(description="labelled set that is judged: DATA")
    out: str | None = Field(
        default=None,
        description="JSON file; null: in evaluations/ beside the model, one file for each choice of settings",
    )
    batch_size: int = Field(default=256, ge=1, description="images at a time")


class EvaluatorSettings(JudgeSettings):
    """What every evaluator takes that learns from labels."""

    train: str = Field(description="labelled set to learn from: DATA")


class AccuracySettings(JudgeSettings):
    """Accuracy of a model's own classifiers, exits and their ensemble."""


class KnnSettings(EvaluatorSettings, CacheSettings):
    """Weighted k-NN on frozen features (Caron et al. 2021, appendix F.1)."""

    test: str | None = Field(  # pyright: ignore
        description="labelled set that is judged: DATA; null: the training set judges itself, leaving one out"
    )
    k: Annotated[list[int], BeforeValidator(several)] = Field(
        default=[20], description="neighbours that vote; one or a list"
    )
    temperature: float = Field(default=0.07, gt=0, description="a vote weighs exp(similarity / temperature)")
    shots: Counts = Field(
        default=[], description="also with so many training images a class alone, one or a list; k is then at most all"
    )
    seeds: int = Field(default=5, ge=1, description="draws of those images: mean and interval are over them")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the first draw")


class LinearSettings(EvaluatorSettings, CacheSettings):
    """Linear probe on frozen features (Caron et al. 2021, appendix F.2)."""

    blocks: Annotated[list[Annotated[int, Field(ge=1)] | None], BeforeValidator(several), Field(min_length=1)] = Field(
        default=[None],
        description="last blocks whose pooled outputs are concatenated; null: 4 with a class token, else 1; of a list, "
        "the best on a tenth of the training set is taken, together with pool and lr",
    )
    pool: Annotated[list[Pool], BeforeValidator(several), Field(min_length=1)] = Field(
        default=["cls"], description=f"{POOL}; or a list"
    )
    lr: Positive = Field(
        default=[0.001, 0.003, 0.01, 0.03, 0.1],
        description="learning rate for 256 images a step; of a list, the best on a tenth of the training set is taken",
    )
    epochs: int = Field(default=100, ge=1, description="passes over the training set")
    batch_size: int = Field(default=1024, ge=1, description="features a step")
    augment: bool = Field(
        default=False, description="random resized crops and flips; features are computed anew every epoch"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="order of the features and first weights")
    embed_batch_size: int = Field(default=256, ge=1, description="images at a time through the backbone")


class LogisticSettings(EvaluatorSettings, CacheSettings):
    """Logistic regression on frozen features, to the optimum (L-BFGS in float64 on the CPU)."""

    l2: Positive = Field(
        default=[1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        description="weight of the penalty l2 / 2 * |weight|^2; of a list, the best on a tenth of the training set",
    )
    share: Annotated[list[Annotated[float, Field(gt=0, le=1)]], BeforeValidator(several), Field(min_length=1)] = Field(
        default=[1.0], description="of each class's training images, at least one, whose labels are used; or a list"
    )
    seeds: int = Field(default=3, ge=1, description="draws of a share below 1: mean and interval are over them")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the first draw, and of what is held out")
    blocks: int | None = Field(default=1, ge=1, description="last blocks whose pooled outputs are concatenated")
    pool: Pool = Field(default="cls", description=POOL)


class RetrievalSettings(JudgeSettings, CacheSettings):
    """Retrieval: mean average precision, and whether one of the k nearest images is of the query's class."""

    test: str = Field(description="labelled queries: DATA")
    train: str | None = Field(
        default=None, description="labelled images to find: DATA; null: the queries, none of which finds itself"
    )
    k: Annotated[Counts, Field(min_length=1)] = Field(default=[1, 5, 10], description="of recall at k; one or a list")


class SegmentationSettings(EvaluatorSettings):
    """Semantic segmentation from frozen patch features: k-NN and a linear classifier of patches."""

    train: str = Field(description="folder with images/ and masks/ of the same names: PNG, class numbers")
    test: str = Field(description="such a folder, judged")
    size: Size | None = Field(
        default=None, description="images are squeezed to this side, or [height, width], in pixels; null: the model's"
    )
    ignore: int = Field(default=255, ge=0, description="number in masks that says no class")
    k: int = Field(default=30, ge=1, description="patches that vote")
    temperature: float = Field(default=0.07, gt=0, description="a vote weighs exp(similarity / temperature)")
    patches: int = Field(default=50_000, ge=1, description="training patches, drawn evenly from all images; at most")
    l2: Positive = Field(
        default=[1e-5, 1e-3, 1e-1],
        description="penalty of the linear classifier; of a list, the best on a tenth of the training patches",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="draws the training patches")
    batch_size: int = Field(default=32, ge=1, description="images at a time")


class RanksSettings(JudgeSettings, CacheSettings):
    """Without labels: RankMe, LiDAR, alpha-ReQ, uniformity and alignment."""

    test: str = Field(description="images that are judged, with labels or without: DATA")
    images: int = Field(default=1000, ge=2, description="of which several views are seen, evenly spaced over the set")
    views: int = Field(default=10, ge=2, description="random resized crops and flips of each of these images")
    seed: int = Field(default=0, ge=0, lt=2**63, description="draws the views")


class SuiteSettings(FrozenSettings, CacheSettings):
    """A list of evaluators, run one after the other on the same features."""

    suite: str = Field(description="YAML file, or the name of one in configs/suites")
    train: str | None = Field(default=None, description="in place of the file's")
    test: str | None = Field(default=None, description="in place of the file's")
    out: str | None = Field(
        default=None, description="table, .json or .md: the other one is written beside it; null: beside the model"
    )


class SuiteFile(Settings):
    """What a suite's file holds. evaluators: {name: {its settings}}."""

    train: str | None = Field(default=None, description="labelled set to learn from: DATA")
    test: str | None = Field(default=None, description="labelled set that is judged: DATA")
    evaluators: dict[str, dict[str, Any] | None] = Field(description="settings of each, by name", min_length=1)


class EmbedSettings(FrozenSettings):
    """Features of a whole set in one file."""

    out: str = Field(description="file: .npz, or .parquet (extra: parquet)")
    layers: Annotated[list[int], BeforeValidator(several)] = Field(
        default=[], description="blocks (stages), from 0 or -1 for the last, whose outputs are concatenated; []: the "
        "model's output"
    )  # fmt: skip
    pool: Pool = Field(default="cls", description=POOL)
    tokens: Literal["pooled", "patch", "register"] = Field(
        default="pooled",
        description="one feature an image, or those of all patches or registers of the last block",
    )
    batch_size: int = Field(default=256, ge=1, description="images at a time; other sizes round differently")
    chunk: int = Field(
        default=4096, ge=1, description="images between two saves, from which a run that was cut off goes on"
    )
