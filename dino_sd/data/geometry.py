"""Stage one of the views, in the loader's workers: cut, resize and flip every crop straight from the uint8 image."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from dino_sd.data.draws import RANDAUGMENT, boxes, center_box, draw, flips, rows
from dino_sd.data.randaugment import randaugment_
from dino_sd.data.resample import resample_stack
from dino_sd.data.source import Source
from dino_sd.data.views import ViewGroup, ViewSpec

# The batched path tabulates its weights over all crop lengths; for longer sides the table stops paying.
_LONGEST_STACK_SIDE = 128
_SHRINKS = (8, 4, 2)  # what the JPEG format can decode at


def make_views(
    source: Source, spec: ViewSpec, seed: int, epoch: int, images_B: np.ndarray
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """All views of some images: a pure function of the arguments.

    Returns, per group of the spec, the crops, uint8 (V * B, C, H, W) with all images of the first view first, and their
    photometric parameters, float32 (V * B, len(Row)). Raises UserError where an image cannot be read.
    """
    u_VBn = draw(spec, seed, epoch, images_B)
    flips_VB = flips(u_VBn, spec)
    rows_VBR = torch.from_numpy(rows(u_VBn, spec))
    in_memory = source.stack is not None and max(source.stack.shape[-2:]) <= _LONGEST_STACK_SIDE
    cut = _cut_from_stack if in_memory else _cut_one_by_one
    crops = cut(source, spec, images_B, u_VBn, flips_VB)
    if spec.randaugment is not None:
        for group, views, crops_NCHW in zip(spec.groups, _group_slices(spec), crops, strict=True):
            if group.center is None:
                randaugment_(crops_NCHW, u_VBn[views, :, RANDAUGMENT].reshape(-1), *spec.randaugment)
    return crops, [rows_VBR[views].flatten(0, 1) for views in _group_slices(spec)]


def _group_slices(spec: ViewSpec) -> list[slice]:
    ends = np.cumsum([0] + [group.count for group in spec.groups]).tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def _boxes(group: ViewGroup, u: np.ndarray, sizes: np.ndarray, spec: ViewSpec) -> np.ndarray:
    """The boxes of a group's views: int64 (..., 4). u: (..., NUMBERS); sizes: (2,), height and width of all images."""
    if group.center is None:
        return boxes(u, sizes, group.scale, spec.ratio)
    return np.tile(center_box(sizes, group.size, group.center), (*u.shape[:-1], 1))


def _cut_from_stack(source, spec, images_B, u_VBn, flips_VB) -> list[torch.Tensor]:
    assert source.stack is not None
    images_BCHW = source.stack[torch.from_numpy(np.ascontiguousarray(images_B))]
    sizes = np.array(images_BCHW.shape[-2:])
    crops = []
    for group, views in zip(spec.groups, _group_slices(spec), strict=True):
        boxes_VB4 = _boxes(group, u_VBn[views], sizes, spec)
        crops.append(resample_stack(images_BCHW, boxes_VB4, flips_VB[views], group.size))
    return crops


def _cut_one_by_one(source, spec, images_B, u_VBn, flips_VB) -> list[torch.Tensor]:
    crops = [
        torch.empty(group.count, len(images_B), spec.channels, *group.size, dtype=torch.uint8) for group in spec.groups
    ]
    group_slices = _group_slices(spec)
    for position, index in enumerate(images_B.tolist()):
        picture = source.picture(index)
        size = np.array([picture.height, picture.width])
        boxes_of_groups = [
            _boxes(group, u_VBn[views, position], size, spec)
            for group, views in zip(spec.groups, group_slices, strict=True)
        ]
        # Clean views choose their own: they then depend on nothing random, and the others not on them.
        shrinks = {clean: _largest_shrink(boxes_of_groups, spec, clean) for clean in (False, True)}
        decode = cache(picture.decode)
        for group, boxes_V4, views, out in zip(spec.groups, boxes_of_groups, group_slices, crops, strict=True):
            image_CHW = decode(shrinks[group.center is not None])
            mirrored_V = flips_VB[views, position].tolist()
            for view, box in enumerate(_shrink_boxes(boxes_V4, size, image_CHW)):
                crop_CHW = crop_resize(image_CHW, box, group.size)
                out[view, position] = crop_CHW.flip(-1) if mirrored_V[view] else crop_CHW
    return [crop.flatten(0, 1) for crop in crops]


def _largest_shrink(boxes_of_groups: list[np.ndarray], spec: ViewSpec, clean: bool) -> int:
    """How much smaller the image may be decoded so that no clean, or no other, crop is enlarged that was not before."""
    spares = [
        (boxes_V4[:, 2:] / group.size).min()
        for boxes_V4, group in zip(boxes_of_groups, spec.groups, strict=True)
        if group.count and (group.center is not None) == clean
    ]
    spare = min(spares, default=1)
    return next((shrink for shrink in _SHRINKS if shrink <= spare), 1)


def _shrink_boxes(boxes_V4: np.ndarray, size: np.ndarray, image_CHW: torch.Tensor) -> list[list[int]]:
    """Boxes drawn on an image of `size` (height, width), on the same image as it was decoded."""
    decoded = np.array(image_CHW.shape[-2:])
    if (decoded == size).all():
        return boxes_V4.tolist()
    factor = decoded / size
    starts = np.minimum(np.rint(boxes_V4[:, :2] * factor), decoded - 1)
    lengths = np.clip(np.rint(boxes_V4[:, 2:] * factor), 1, decoded - starts)
    return np.concatenate([starts, lengths], axis=1).astype(np.int64).tolist()


def crop_resize(image_CHW: torch.Tensor, box: list[int], size: tuple[int, int]) -> torch.Tensor:
    """One crop, bicubic and antialiased as in Pillow: uint8 (C, H, W). box: top, left, height, width in pixels."""
    top, left, height, width = box
    crop_1CHW = image_CHW[None, :, top : top + height, left : left + width]
    if (height, width) == tuple(size):
        return crop_1CHW[0]
    return F.interpolate(crop_1CHW, size, mode="bicubic", antialias=True)[0]
