"""Pictures of a few fixed images as a network sees them, into the folder of its run."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_sd import sheets
from dino_sd.config import Config
from dino_sd.data.evaluation import resize_crop
from dino_sd.data.source import BadImage, Source
from dino_sd.data.statistics import enough, evenly
from dino_sd.embed import extractor
from dino_sd.errors import UserError
from dino_sd.models.model import Model
from dino_sd.pictures import attention_sheet, neighbour_sheet, pca_sheet

SHOWN = 5  # images, evenly spaced over the data
ASKED = 128  # images among which neighbours are looked for
NEIGHBOURS = 6
FEWEST = 4 * NEIGHBOURS  # images below which there are no neighbours
WIDEST = 1440  # pixels of a picture
BATCH = 32  # images at a time
ENLARGED = 590  # pixels, width up to which small crops are shown larger


class FixedImages:
    """Some images of a source, always the same ones, that are looked at again and again.

    span: what is black and white to colour operations; see `run.describe`.
    """

    def __init__(self, source: Source, cfg: Config, span: Sequence[float]):
        self.source = source
        self.cfg = cfg.model_copy(update={"views": cfg.views.model_copy(update={"range": tuple(span)})})
        self.shown = [(i, image) for i in evenly(len(source), SHOWN).tolist() if (image := self._image(i)) is not None]
        known = {index for index, _ in self.shown}
        self.asked = [index for index in evenly(len(source), ASKED).tolist() if index not in known]

    def _image(self, index: int) -> Tensor | None:
        """Large ones at a fraction of their size. None where it cannot be read."""
        with suppress(BadImage):
            picture = self.source.picture(index)
            return picture.decode(enough(picture))
        return None

    def draw(self, model: Model, folder: Path, step: int) -> None:
        """Writes folder/step_N_KIND.webp of every kind that there is of such a model and such images.

        step: of the run, done. The model is in eval mode, with parameters in float32. Raises OSError.
        """
        images = [image for _, image in self.shown]
        kinds: dict[str, Callable[[], Image.Image | None]] = {
            "attention": lambda: attention_sheet(model, images),
            "pca": lambda: pca_sheet(model, images),
            "neighbours": lambda: self._neighbours(model),
            "crops": lambda: self._crops(max(step - 1, 0)),
        }
        for kind, made in kinds.items():
            try:
                sheet = made() if images else None
            except UserError:  # a model without attention, images that went bad
                continue
            if sheet is not None:
                save(sheet, folder / f"step_{step:08d}_{kind}.webp")

    def _neighbours(self, model: Model) -> Image.Image | None:
        queries_QD = self._features(model, [image for _, image in self.shown])
        found = [(index, image) for index in self.asked if (image := self._image(index)) is not None]
        if len(found) < FEWEST:
            return None
        similar_QN = queries_QD @ self._features(model, [image for _, image in found]).T
        best = similar_QN.topk(NEIGHBOURS)
        rows = [
            [
                (found[at][1], similarity, self.source.label_name(found[at][0]))
                for similarity, at in zip(*row, strict=True)
            ]
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        names = [self.source.label_name(index) for index, _ in self.shown]
        return neighbour_sheet([image for _, image in self.shown], rows, names if any(names) else ())

    def _features(self, model: Model, images: list[Tensor]) -> Tensor:
        """Of unit length, (N, D) on the CPU."""
        size, device = model.size or (32, 32), next(model.backbone.parameters()).device
        of = extractor(
            model.backbone, model.mean, model.std, device, "fp32", lambda images: model.backbone(images).pooled_ND
        )
        cut = [resize_crop(image, size, model.crop) for image in images]
        features = [of(torch.stack(cut[start : start + BATCH])).cpu() for start in range(0, len(cut), BATCH)]
        return torch.nn.functional.normalize(torch.cat(features), dim=1)

    def _crops(self, step: int) -> Image.Image:
        crops = sheets.crops_of_step(self.cfg, self.source, SHOWN, step)
        sheet, _ = sheets.crops_sheet(crops, self.source.dtype == torch.uint8, originals=True)
        picture = Image.fromarray((sheet * 255).round().astype(np.uint8)).convert("RGB")
        larger = max(ENLARGED // picture.width, 1)
        return picture.resize((picture.width * larger, picture.height * larger), Image.Resampling.NEAREST)


def save(sheet: Image.Image, path: Path) -> None:
    """Whole or not at all, at most WIDEST pixels wide. Raises OSError."""
    if sheet.width > WIDEST:
        sheet = sheet.resize((WIDEST, math.ceil(sheet.height * WIDEST / sheet.width)), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        sheet.save(temporary, "webp", quality=80)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
