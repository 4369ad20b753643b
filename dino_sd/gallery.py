"""What a model makes of a set of images, as files: the commands neighbours, map and prototypes."""

import copy
import csv
import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from dino_sd.checkpoint import write_whole
from dino_sd.components import coordinates
from dino_sd.config import MapSettings, NeighboursSettings, PrototypesSettings, SetSettings
from dino_sd.data.source import Chosen, Source, open_source
from dino_sd.data.statistics import evenly
from dino_sd.distributed import is_main, say, setup
from dino_sd.embed import embed
from dino_sd.errors import UserError
from dino_sd.features import own_size, prepare, workers_of
from dino_sd.maps import draws_thumbnails, map_figure
from dino_sd.models.model import Model
from dino_sd.nearest import nearest
from dino_sd.pictures import neighbour_sheet, prototype_sheet
from dino_sd.progress import progress
from dino_sd.prototypes import most_used
from dino_sd.shapes import NO_LABEL
from dino_sd.tiles import check, save


def neighbours(spec: str | Path, data: str, settings: NeighboursSettings) -> Path | None:
    """Writes a sheet of some images of a set, each with the nearest others; returns its path (None on other ranks).

    Similarity is the cosine of pooled features, as in k-NN. Raises UserError for images that there are not.
    """
    check(out := Path(settings.out))
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    source = open_source(data, model.channels)
    for index in settings.images or ():
        if index >= len(source):
            raise UserError(f"images={index}: not among 0 to {len(source) - 1}, in '{data}'; choose another")
    features_ND, indices_N = features_of(model, device, source, settings)
    if not is_main():
        return None
    if len(indices_N) < 2:
        raise UserError(f"data: '{data}' has {len(indices_N)} image that can be read; neighbours need two")
    place_of = {index: place for place, index in enumerate(indices_N.tolist())}
    wanted = settings.images or indices_N[evenly(len(indices_N), settings.count)].tolist()
    for index in wanted:
        if index not in place_of:
            reason = f"left out by limit={settings.limit}" if settings.limit else "cannot be read"
            raise UserError(f"images={index}: {reason}, in '{data}'; choose another")
    places_N = torch.tensor([place_of[index] for index in wanted])
    queries_ND = F.normalize(features_ND[places_N], dim=1)
    k = min(settings.k, len(indices_N) - 1)
    similarity_NK, index_NK = nearest(features_ND, queries_ND, k, own_N=places_N)
    rows = [
        [
            (source.image(index), similarity, source.label_name(index))
            for similarity, index in zip(similarities, indices_N[others_K].tolist(), strict=True)
        ]
        for similarities, others_K in zip(similarity_NK.tolist(), index_NK, strict=True)
    ]
    names = [source.label_name(index) or source.path(index).rsplit("/", 1)[-1] for index in wanted]
    sheet = neighbour_sheet([source.image(index) for index in wanted], rows, names)
    save(sheet, out)
    return out


def map(spec: str | Path, data: str, settings: MapSettings) -> Path | None:
    """Draws a set's features on a plane; returns the picture's path (None on other ranks).

    Raises UserError for a method that is not installed.
    """
    if settings.coordinates and not settings.coordinates.endswith((".csv", ".json")):
        raise UserError(f"coordinates={settings.coordinates}: expected a .csv or .json file")
    check(out := Path(settings.out), Figure)
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    source = open_source(data, model.channels)
    features_ND, indices_N = features_of(model, device, source, settings)
    if not is_main():
        return None
    places_N2, axes_are = coordinates(features_ND, settings.method, settings.seed)
    indices, all_labels_N = indices_N.tolist(), source.labels()
    labels_N = torch.full((len(indices),), NO_LABEL)
    if all_labels_N is not None:
        labels_N = torch.from_numpy(all_labels_N[indices_N.numpy()])
    pictures = [source.image(index) for index in indices] if draws_thumbnails(len(indices)) else []
    title = f"{len(indices):,} images of {data}, {model.description}"
    save(map_figure(places_N2, axes_are, labels_N, source.classes, title, pictures), out)
    if settings.coordinates:
        places = zip(indices, places_N2.tolist(), strict=True)
        rows = [
            {"index": index, "path": source.path(index), "x": x, "y": y, "label": source.label_name(index)}
            for index, (x, y) in places
        ]
        _write_rows(Path(settings.coordinates), rows)
    return out


def prototypes(spec: str | Path, data: str, settings: PrototypesSettings) -> Path | None:
    """Writes the prototypes that a set uses most, with images; returns the picture's path (None on other ranks).

    Raises UserError for models without a DINO head.
    """
    check(out := Path(settings.out))
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    projection = getattr(model, "projection", None)
    if projection is None:
        raise UserError(
            f"MODEL {model.description} has no prototypes: they are in the head of a run with the term dino; "
            f"name the run or a checkpoint of it (exports and timm's models have none)"
        )
    source = open_source(data, model.channels)
    features_ND, indices_N = features_of(model, device, source, settings)
    if not is_main():
        return None
    found = most_used(projection.to(device).eval(), features_ND, settings.count, settings.images)
    names = [
        f"prototype {number}\n{share:.1%} of images"
        for number, share in zip(found.prototypes_K.tolist(), found.share_K.tolist(), strict=True)
    ]
    rows = []
    for places, scores in zip(found.images_KN.tolist(), found.scores_KN.tolist(), strict=True):
        indices = [int(indices_N[place]) for place in places]
        rows.append(
            [
                (source.image(index), f"{score:+.2f} {source.label_name(index)}".strip())
                for index, score in zip(indices, scores, strict=True)
            ]
        )
    save(prototype_sheet(names, rows), out)
    say(f"{found.used:,} prototypes are used by {len(indices_N):,} images of {data}")
    return out


def features_of(model: Model, device: torch.device, source: Source, settings: SetSettings) -> tuple[Tensor, Tensor]:
    """(features_ND on the CPU, indices_N of their images in the source); some may be left out."""
    chosen_N = evenly(len(source), settings.limit or len(source))
    numbered = copy.copy(source) if len(chosen_N) == len(source) else Chosen(source, chosen_N)
    numbered._labels = chosen_N  # what `embed` says of each image: some may be left out
    with progress(f"features of {source.name}") as show:
        features_ND, indices_N = embed(
            model.backbone, numbered, size=model.size or own_size(source), crop=model.crop, mean=model.mean,
            std=model.std, device=device, batch_size=settings.batch_size,
            workers=workers_of(settings, device, source),
            precision=settings.precision, progress=show,
        )  # fmt: skip
    return features_ND, indices_N


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    if path.suffix == ".json":
        content = json.dumps(rows, indent=1)
    else:
        lines = io.StringIO(newline="")
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        content = lines.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"coordinates={path}: cannot be written ({error.strerror}); choose another file") from None
