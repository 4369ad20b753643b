"""What evaluators and exporters, and people, take: a frozen backbone, what it expects, and the classes it knows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from dino_sd.data.decode import as_asked, pixels_of
from dino_sd.data.evaluation import resize_crop
from dino_sd.data.source import WHITE
from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone
from dino_sd.models.pixels import Pixels

Tokens = Literal["cls", "patch", "register"]


@dataclass(frozen=True)
class Model:
    """A frozen backbone in eval mode and the images it expects; `print(model)` says what it is.

    size: (height, width) in pixels, None where the data decides; crop: share of the resized image's side that is kept;
    mean, std: per channel, pixels from 0 to 1. description: one line for people. provenance: where the weights come
    from, plain values. folder: where results belong, if anywhere. notes: what had to be adapted, to be said.
    heads: those that say classes ("classifier", "exit_3", ...), of a model that was trained with labels; classes: their
    names in order, None where nobody knows them. norms: of each trained exit, by the number of its block.
    projection: the DINO head, (N, width) of `features` -> (N, prototypes) logits before any temperature; center: the
    teacher's mean logits (prototypes,) in training. Both None where the weights came without.
    """

    backbone: Backbone | Pixels
    size: tuple[int, int] | None
    crop: float
    mean: list[float]
    std: list[float]
    description: str
    provenance: dict[str, Any]
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    heads: dict[str, nn.Module] = field(default_factory=dict)
    classes: list[str] | None = None
    norms: dict[int, nn.Module] = field(default_factory=dict)
    projection: nn.Module | None = None
    center: Tensor | None = None

    @property
    def channels(self) -> int:
        return self.backbone.channels

    @property
    def weights(self) -> str:
        """Sixteen hex digits that name the weights of backbone and heads, and what class they are of."""
        digest = hashlib.sha256()
        for module in (self.backbone, *self.heads.values()):
            digest.update(f"{type(module).__name__} {getattr(module, 'name', '')}".encode())
            for name, tensor in module.state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                if flat.numel():
                    digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return "\n".join([self.description, f"normalised by mean {mean}, std {std}", *self.notes])

    def transform(self, image: Image.Image) -> Tensor:
        """An image as the backbone expects it, the same pixels as in evaluation: float32 (C, H, W), on the CPU.

        Upright, resized (bicubic, antialiased), cut to its centre, normalised. Raises UserError where it has other
        channels than the model, or 32-bit integers, whose range nobody knows.
        """
        if image.mode == "I":
            raise UserError("image: 32-bit integers have no known white; convert it to 8 or 16 bits, or to floats")
        if image.mode[0] in "IF":
            pixels_CHW = np.asarray(ImageOps.exif_transpose(image))[None]
            pixels_CHW = pixels_CHW.astype(np.float32 if image.mode == "F" else np.uint16)
        else:
            pixels_CHW = pixels_of(image, self.channels)
        dtype = torch.from_numpy(pixels_CHW[:, :1, :1].copy()).dtype
        try:
            image_CHW = torch.from_numpy(as_asked(pixels_CHW, self.channels, dtype))
        except ValueError as error:
            raise UserError(f"image of mode {image.mode}: {error}; the model expects {self.channels}") from None
        if self.size is not None:
            image_CHW = resize_crop(image_CHW, self.size, self.crop)
        mean_C11, std_C11 = (torch.tensor(list(values)).view(-1, 1, 1) for values in (self.mean, self.std))
        return image_CHW.to(torch.float32, copy=True).div_(WHITE[dtype]).sub_(mean_C11).div_(std_C11)

    def features(
        self,
        images: Tensor | Image.Image | Sequence[Image.Image],
        layers: int | Sequence[int] | None = None,
        tokens: Tokens = "cls",
        as_map: bool = True,
        norm: bool = True,
    ) -> Any:
        """What the backbone says of images: one float32 tensor, or a list of them for a list of layers.

        images: normalised (N, C, H, W), or images of Pillow, which `transform` prepares; all go through in one batch.
        layers: blocks (stages of a convnet) from 0, negative from the end; None: the model's output. norm: each is
        normed by the model's last norm, where it has one.
        tokens: "cls" gives (N, D), the pooled output where there is no class token; "patch" (N, D, h, w), or
        (N, h * w, D) where as_map is False: patch tokens, or the cells of a feature map; "register" (N, R, D).
        Raises UserError for layers and tokens that there are not, and for images that the model cannot take.
        """
        backbone = self.backbone
        images_NCHW = self._batch(images)
        chosen = [layers] if isinstance(layers, int) else layers
        if tokens not in ("cls", "patch", "register"):
            raise UserError(f"tokens={tokens}: expected cls, patch or register")
        if wrong := [layer for layer in chosen or [] if not -backbone.depth <= layer < backbone.depth]:
            raise UserError(
                f"layers={wrong[0]}: model={backbone.name} has {backbone.depth}; use 0 to {backbone.depth - 1}, or -1 "
                f"for the last"
            )
        if tokens == "register" and not backbone.registers:
            raise UserError(f"tokens=register: model={backbone.name} has no register tokens; use cls or patch")
        with torch.no_grad(), torch.autocast(images_NCHW.device.type, enabled=False):
            try:
                found = backbone.tokens(images_NCHW, chosen, tokens, norm)
            except (AssertionError, RuntimeError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                shape = "x".join(map(str, images_NCHW.shape))
                raise UserError(f"images of {shape}: model={backbone.name} cannot take them: {reason}") from error
        if tokens == "patch" and not as_map:
            found = [map_NDHW.flatten(2).transpose(1, 2) for map_NDHW in found]
        return list(found) if isinstance(layers, Sequence) else found[0]

    def _batch(self, images: Tensor | Image.Image | Sequence[Image.Image]) -> Tensor:
        """(N, C, H, W) float32, normalised, on the backbone's device."""
        if isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, Tensor):
            if not images or not all(isinstance(image, Image.Image) for image in images):
                raise UserError(
                    "images: expected a normalised tensor (N, C, H, W), an image of Pillow or a list of them"
                )
            images = torch.stack([self.transform(image) for image in images])
        if images.ndim != 4 or images.shape[1] != self.channels or not images.is_floating_point():
            raise UserError(
                f"images: a tensor of {images.dtype} and shape {tuple(images.shape)}; expected normalised floats "
                f"(N, {self.channels}, H, W), as model.transform makes them of images of Pillow"
            )
        device = next((parameter.device for parameter in self.backbone.parameters()), images.device)
        return images.to(device, torch.float32)


def check_same_classes(where: str, theirs: list[str] | int, other: str, ours: list[str]) -> None:
    """Raises UserError unless both are the same classes in the same order. theirs: a number where nobody named them."""
    if theirs in (ours, len(ours)):
        return
    count, names = (theirs, None) if isinstance(theirs, int) else (len(theirs), theirs)
    differing = ["unknown, they have no names there"] if names is None else sorted({*names} ^ {*ours})[:3]
    raise UserError(
        f"{where} has other classes than {other}: {count} against {len(ours)}, not in both: "
        f"{', '.join(differing) or 'none, but their order'}; both need the same classes, in the same order"
    )
