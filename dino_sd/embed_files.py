"""Features of a whole set of images in one file: in chunks, so that memory does not grow and a cut run goes on."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino_sd import __version__
from dino_sd.data.cache import dates_of
from dino_sd.data.evaluation import eval_batches
from dino_sd.data.source import Chosen, Source, open_source, short_hash
from dino_sd.distributed import is_main, rank, say, setup, together, world_size
from dino_sd.embed import extractor, pooled
from dino_sd.errors import UserError
from dino_sd.evaluator_config import EmbedSettings
from dino_sd.features import own_size, prepare, workers_of
from dino_sd.models.backbone import Backbone
from dino_sd.models.model import Model
from dino_sd.progress import progress
from dino_sd.settings import plain

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's first day, of every entry: equal features make equal files
_WAIT = 86_400  # seconds that ranks wait for each other at the end: some are slower
_NO_NUMBER = ("out", "workers", "device")  # settings that change no feature


def embed_files(spec: str | Path | Model, data: str, settings: EmbedSettings) -> Path:
    """Writes features, index, label and path of every image that can be read, in the order of the set; says where.

    .npz: `features` float32 (N, D), or (N, P, D) of patches or registers; `index` and `label` int64 (N,), label -1
    where there is none; `path` and `classes` text. .parquet: one row an image, features as a list (of all tokens one
    after the other). Chunks lie in a folder beside the file until all are there: the same command goes on from them,
    and ends with the same bytes.
    Under torchrun every rank works on chunks of its own, and rank 0 joins them. Raises UserError where the file cannot
    be written, the model has no such layers, or no image can be read.
    """
    out = Path(settings.out).expanduser()
    if out.suffix not in (".npz", ".parquet"):
        raise UserError(f"out={out}: expected a name that ends in .npz or .parquet")
    write = _write_npz if out.suffix == ".npz" else _parquet_writer()
    device = setup(settings.device, timeout_s=_WAIT)
    model = prepare(spec, device, settings)
    source = open_source(data, model.channels)
    size = model.size or own_size(source)
    layers = _layers(model, settings)
    function = extractor(
        model.backbone, model.mean, model.std, device, settings.precision, _of(model, settings, layers)
    )
    # a multiple of the batch: batches are the same ones wherever a run was cut
    every = max(1, round(settings.chunk / settings.batch_size)) * settings.batch_size
    chunks = [range(start, min(start + every, len(source))) for start in range(0, len(source), every)]
    folder = out.with_name(f"{out.name}.parts")
    try:
        together(lambda: _prepare_folder(folder, _signature(model, source, settings, size, device)))
        together(lambda: _compute(function, source, model, settings, size, device, folder, chunks))
        together(lambda: _join(folder, len(chunks), source, out, write))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"out={out}: cannot be written ({reason}); choose another file") from None
    return out


def _layers(model: Model, settings: EmbedSettings) -> list[int]:
    depth = model.backbone.depth
    if settings.tokens == "register" and not (isinstance(model.backbone, Backbone) and model.backbone.registers):
        raise UserError(f"tokens=register: {model.description} has no register tokens; use pooled or patch")
    if settings.tokens != "pooled" and (len(settings.layers) > 1 or "pool" in settings.model_fields_set):
        raise UserError(
            f"tokens={settings.tokens}: those of one block are written, as they are; give one of "
            f"layers={settings.layers}, and no pool"
        )
    for layer in settings.layers:
        if not -depth <= layer < depth:
            raise UserError(f"layers={layer}: the model has {depth} blocks, 0 to {depth - 1}, or -1 for the last")
    return settings.layers


def _of(model: Model, settings: EmbedSettings, layers: list[int]) -> Callable[[Tensor], Tensor]:
    """From normalised images to what is written of them."""

    def of(images_BCHW: Tensor) -> Tensor:
        if settings.tokens == "register" and isinstance(model.backbone, Backbone):
            return model.backbone.tokens(images_BCHW, layers[-1:] or None, "register")[0]
        features = model.backbone(images_BCHW, layers)
        if settings.tokens == "patch":
            return features.layers[-1][1] if features.layers else features.patches_NPD
        return pooled(features, settings.pool)

    return of


def _signature(
    model: Model, source: Source, settings: EmbedSettings, size: tuple[int, int], device: torch.device
) -> dict[str, Any]:
    """What chunks depend on, and thus whether those that lie there can be used."""
    own = {key: value for key, value in plain(settings).items() if key not in _NO_NUMBER}
    files = short_hash(repr(dates_of(source.files())).encode())
    return {
        "settings": own, "weights": model.weights, "model": short_hash(repr(model.backbone).encode()),
        "data": source.fingerprint(), "files": files, "images": len(source), "size": list(size), "crop": model.crop,
        "mean": list(model.mean), "std": list(model.std), "device": device.type,
        "versions": [__version__, torch.__version__],
    }  # fmt: skip


def _prepare_folder(folder: Path, signature: dict[str, Any]) -> None:
    """Rank 0 throws chunks of another model, set or settings away."""
    if not is_main():
        return
    place = folder / "what.json"
    with suppress(OSError, ValueError):
        if json.loads(place.read_text()) == signature:
            say(f"going on with what lies in {folder}")
            return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place.write_text(json.dumps(signature))


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def _columns(folder: Path, chunks: int, name: str) -> Iterator[Tensor]:
    """`name` of every chunk in turn. Raises UserError where one cannot be read; it is taken away, to be made again."""
    for number in range(chunks):
        try:
            with safe_open(_chunk(folder, number), "pt") as file:
                yield file.get_tensor(name)
        except (OSError, SafetensorError):
            _chunk(folder, number).unlink(missing_ok=True)
            raise UserError(f"{_chunk(folder, number)} cannot be read; the same command makes it again") from None


def _compute(
    function: Callable[[Tensor], Tensor],
    source: Source,
    model: Model,
    settings: EmbedSettings,
    size: tuple[int, int],
    device: torch.device,
    folder: Path,
    chunks: list[range],
) -> None:
    """This rank's chunks that are not there yet: one stream of images, saved whenever a chunk is through."""
    mine = range(rank(), len(chunks), world_size())
    missing = [number for number in mine if not _chunk(folder, number).is_file()]  # a file there is a whole one
    if not missing:
        return
    images = np.concatenate([np.arange(chunks[number].start, chunks[number].stop) for number in missing])
    blank = function(torch.zeros(1, model.channels, *size, dtype=torch.uint8)).float().cpu()[:0]
    part = Chosen(source, images)
    ahead, waiting, labels_N = iter(missing), [(blank, torch.empty(0, dtype=torch.int64))], source.labels()
    number = next(ahead)

    def save() -> None:
        features, index_N = (torch.cat(rows) for rows in zip(*waiting, strict=True))
        label_N = torch.full_like(index_N, -1) if labels_N is None else torch.from_numpy(labels_N)[index_N]
        temporary = _chunk(folder, number).with_suffix(".tmp")
        save_file({"features": features.contiguous(), "index": index_N, "label": label_N}, temporary)
        os.replace(temporary, _chunk(folder, number))
        del waiting[1:]

    with progress(f"embed {source.name}") as step:
        batches = eval_batches(
            part, size, model.crop, settings.batch_size, workers_of(settings, device, source), whole=False
        )
        for images_BCHW, _, places_B in batches:
            index_B = torch.from_numpy(images)[places_B]
            while int(index_B[0]) >= chunks[number].stop:  # a chunk may end, or consist, of unreadable images
                save()
                number = next(ahead)
            waiting.append((function(images_BCHW).float().cpu(), index_B))
            step(int(places_B[-1]) + 1, len(images))
        save()
        for number in ahead:  # noqa: B007 - save() reads it
            save()


def _join(folder: Path, chunks: int, source: Source, out: Path, write: Callable[..., None]) -> None:
    """Rank 0 makes one file of all chunks, which appears whole or not at all; the chunks go."""
    if not is_main():
        return

    def column(name: str) -> Iterator[Tensor]:
        return _columns(folder, chunks, name)

    total, shape = sum(len(index_N) for index_N in column("index")), next(column("features")).shape[1:]
    if not total:
        raise UserError(f"data: no image of '{source.name}' can be read")
    temporary = out.with_name(f".{out.name}.tmp")
    write(temporary, column, (total, *shape), source)
    os.replace(temporary, out)
    shutil.rmtree(folder, ignore_errors=True)
    say(f"{total:,} of {len(source):,} images of {source.name}, features {tuple(shape)}")


def _write_npz(out: Path, column: Callable[[str], Iterator[Tensor]], shape: tuple[int, ...], source: Source) -> None:
    """An uncompressed .npz, written array by array and chunk by chunk; its bytes depend on nothing but the numbers."""
    longest = max(len(source.path(index)) for index_N in column("index") for index in index_N.tolist())
    text = np.dtype(f"<U{longest}")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def entry(name: str, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> None:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, header)  # pyright: ignore
                for block in blocks:
                    file.write(np.ascontiguousarray(block, dtype=dtype).tobytes())

        entry("features", np.dtype("<f4"), shape, (block.numpy() for block in column("features")))
        for name in ("index", "label"):
            entry(name, np.dtype("<i8"), shape[:1], (block.numpy() for block in column(name)))
        names = ([source.path(index) for index in block.tolist()] for block in column("index"))
        entry("path", text, shape[:1], (np.array(block, dtype=text) for block in names))
        if source.classes:
            classes = np.array(source.classes)
            entry("classes", classes.dtype, classes.shape, iter([classes]))


def _parquet_writer() -> Callable[..., None]:
    """Raises UserError where pyarrow is not installed: before anything is computed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("out: .parquet files need pyarrow; install the extra: pip install 'dino-sd[parquet]'") from None

    def write(out: Path, column: Callable[[str], Iterator[Tensor]], shape: tuple[int, ...], source: Source) -> None:
        width = int(np.prod(shape[1:]))
        fields = [("path", pa.string()), ("index", pa.int64()), ("label", pa.int64())]
        fields.append(("features", pa.list_(pa.float32(), width)))
        notes = {"shape": json.dumps(list(shape[1:])), "classes": json.dumps(source.classes)}
        schema = pa.schema(fields, metadata=notes)
        with pq.ParquetWriter(out, schema) as writer:
            parts = zip(column("index"), column("label"), column("features"), strict=True)
            for index_N, label_N, features in parts:
                if not len(index_N):
                    continue
                paths = (source.path(index) for index in index_N.tolist())
                names = [path.encode("utf-8", "backslashreplace").decode() for path in paths]
                arrays = [pa.array(names), pa.array(index_N.numpy()), pa.array(label_N.numpy())]
                flat = pa.array(features.flatten().numpy())
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, width))
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    return write
