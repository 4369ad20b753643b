"""Stage one of the views, in the loader's workers: cut, resize and flip every crop straight from the uint8 image."""

import numpy as np
import torch
import torch.nn.functional as F

from dino_sd.data.draws import boxes, draw, flips, rows
from dino_sd.data.resample import resample_stack
from dino_sd.data.source import Source
from dino_sd.data.views import ViewSpec

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
    return crops, [rows_VBR[views].flatten(0, 1) for views in _group_slices(spec)]


def _group_slices(spec: ViewSpec) -> list[slice]:
    ends = np.cumsum([0] + [group.count for group in spec.groups]).tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def _cut_from_stack(source, spec, images_B, u_VBn, flips_VB) -> list[torch.Tensor]:
    assert source.stack is not None
    images_BCHW = source.stack[torch.from_numpy(np.ascontiguousarray(images_B))]
    sizes = np.array(images_BCHW.shape[-2:])
    crops = []
    for group, views in zip(spec.groups, _group_slices(spec), strict=True):
        boxes_VB4 = boxes(u_VBn[views], sizes, group.scale, spec.ratio)
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
            boxes(u_VBn[views, position], size, group.scale, spec.ratio)
            for group, views in zip(spec.groups, group_slices, strict=True)
        ]
        image_CHW = picture.decode(_largest_shrink(boxes_of_groups, spec))
        for group, boxes_V4, views, out in zip(spec.groups, boxes_of_groups, group_slices, crops, strict=True):
            mirrored_V = flips_VB[views, position].tolist()
            for view, box in enumerate(_shrink_boxes(boxes_V4, size, image_CHW)):
                crop_CHW = crop_resize(image_CHW, box, group.size)
                out[view, position] = crop_CHW.flip(-1) if mirrored_V[view] else crop_CHW
    return [crop.flatten(0, 1) for crop in crops]


def _largest_shrink(boxes_of_groups: list[np.ndarray], spec: ViewSpec) -> int:
    """How much smaller the image may be decoded so that no crop is enlarged that was not enlarged before."""
    spare = min(
        (boxes_V4[:, 2:] / group.size).min()
        for boxes_V4, group in zip(boxes_of_groups, spec.groups, strict=True)
        if group.count
    )
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
