"""Stage one of the views, in the loader's workers: cut, resize and flip every crop straight from the decoded image."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from dino_sd.data.draws import RANDAUGMENT, boxes, center_box, draw, flips, rows
from dino_sd.data.philox import uniforms
from dino_sd.data.randaugment import randaugment_
from dino_sd.data.resample import resample_stack, resize
from dino_sd.data.source import Bad, BadImage, Picture, Source
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.errors import UserError

# The batched path tabulates its weights over all crop lengths; for longer sides the table stops paying.
_LONGEST_STACK_SIDE = 128
_SHRINKS = (8, 4, 2)  # what the JPEG format can decode at
_AT_ONCE = 8  # images that are held decoded; more would be faster by little
_NEIGHBOURS, _MOST_ATTEMPTS = 4, 64  # stand-ins that are tried: the next ones, and all
_STAND_INS = 0x57A4D1  # in place of the seed: a stand-in is the same in every run


class Views(NamedTuple):
    """All views of B images.

    groups: per group of the spec, the crops, (V * B, C, H, W) of the source's dtype with all images of the first view
    first. rows: per group, their photometric parameters, float32 (V * B, len(Row)), on the CPU. indices: int64 (B,),
    of the images that are seen. bad: those that were to be seen and cannot be read, as (index, where, reason).
    """

    groups: list[torch.Tensor]
    rows: list[torch.Tensor]
    indices: np.ndarray
    bad: list[Bad]


def make_views(
    source: Source, spec: ViewSpec, seed: int, epoch: int, images_B: np.ndarray, stack: torch.Tensor | None = None
) -> Views:
    """All views of some images: a pure function of the arguments, and of which images can be read.

    images_B: index + n * len(source) stands for an image that comes for the n-th time again, with views of its own. In
    place of an image that cannot be read comes another, as in `stand_in`, in the views of that place. stack: the
    source's, on the device where the crops are wanted. Raises UserError where dozens of these cannot be read either.
    """
    u_VBn = draw(spec, seed, epoch, images_B)
    flips_VB = flips(u_VBn, spec)
    rows_VBR = torch.from_numpy(rows(u_VBn, spec))
    indices_B, bad = images_B % len(source), []
    stack = source.stack if stack is None else stack
    if stack is not None and cuts_at_once(stack):
        crops = _cut_from_stack(stack, spec, indices_B, u_VBn, flips_VB)
    else:
        crops, indices_B, bad = _cut_one_by_one(source, spec, indices_B, u_VBn, flips_VB)
    views_of_groups = _group_slices(spec)
    if spec.randaugment is not None:
        for group, views, crops_NCHW in zip(spec.groups, views_of_groups, crops, strict=True):
            if group.center is None:
                randaugment_(crops_NCHW, u_VBn[views, :, RANDAUGMENT].reshape(-1), *spec.randaugment)
    return Views(crops, [rows_VBR[views].flatten(0, 1) for views in views_of_groups], indices_B, bad)


def cuts_at_once(stack: torch.Tensor) -> bool:
    """Whether crops of these images are cut a whole batch at a time."""
    return stack.dtype == torch.uint8 and max(stack.shape[-2:]) <= _LONGEST_STACK_SIDE


def _group_slices(spec: ViewSpec) -> list[slice]:
    ends = np.cumsum([0] + [group.count for group in spec.groups]).tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def _boxes(group: ViewGroup, u_VBn: np.ndarray, sizes: np.ndarray, spec: ViewSpec) -> np.ndarray:
    """The boxes of a group's views: int64 (V, B, 4). sizes: heights and widths, (B, 2), or (2,) for all images."""
    if group.center is None:
        return boxes(u_VBn, sizes, group.scale, spec.ratio)
    return np.broadcast_to(center_box(sizes, group.size, group.center), (*u_VBn.shape[:-1], 4))


def _cut_from_stack(
    stack: torch.Tensor, spec: ViewSpec, indices_B: np.ndarray, u_VBn: np.ndarray, flips_VB: np.ndarray
) -> list[torch.Tensor]:
    images_BCHW = stack[torch.from_numpy(np.ascontiguousarray(indices_B)).to(stack.device)]
    sizes = np.array(images_BCHW.shape[-2:])
    crops = []
    for group, views in zip(spec.groups, _group_slices(spec), strict=True):
        boxes_VB4 = _boxes(group, u_VBn[views], sizes, spec)
        crops.append(resample_stack(images_BCHW, boxes_VB4, flips_VB[views], group.size))
    return crops


def _cut_one_by_one(
    source: Source, spec: ViewSpec, indices_B: np.ndarray, u_VBn: np.ndarray, flips_VB: np.ndarray
) -> tuple[list[torch.Tensor], np.ndarray, list[Bad]]:
    """(crops, indices seen, bad ones): as in Views."""
    crops = [
        torch.empty(group.count, len(indices_B), spec.channels, *group.size, dtype=source.dtype)
        for group in spec.groups
    ]
    seen_B, bad, places = indices_B.copy(), [], list(range(len(indices_B)))
    attempts = min(len(source), _MOST_ATTEMPTS)
    for attempt in range(1, attempts + 1):
        failed: list[tuple[int, BadImage]] = []
        for start in range(0, len(places), _AT_ONCE):
            pictures = {}
            for place in places[start : start + _AT_ONCE]:
                try:
                    pictures[place] = source.picture(int(seen_B[place]))
                except BadImage as error:
                    failed.append((place, error))
            failed += _cut_pictures(pictures, spec, u_VBn, flips_VB, crops)
        for place, error in failed:
            bad.append((int(seen_B[place]), error.where, error.reason))
            seen_B[place] = stand_in(int(indices_B[place]), attempt, len(source))
        places = [place for place, _ in failed]
        if not places:
            return [crop.flatten(0, 1) for crop in crops], seen_B, bad
    raise UserError(
        f"data: {attempts} images of '{source.name}', one after the other, cannot be read, among them "
        f"{bad[0][1]}: {bad[0][2]}"
    )


def stand_in(index: int, attempt: int, count: int) -> int:
    """The image of `count` that is tried in place of one that cannot be read: the next ones, then any.

    Bad ones often lie together (a folder copied by half, a shard cut short): soon one is looked for elsewhere, in a
    place that depends on the two numbers alone.
    """
    if attempt <= _NEIGHBOURS or count <= _MOST_ATTEMPTS:
        return (index + attempt) % count
    return int(uniforms(_STAND_INS, attempt, np.array([index]), 0, 1)[0, 0] * count)


def _cut_pictures(
    pictures: dict[int, Picture], spec: ViewSpec, u_VBn: np.ndarray, flips_VB: np.ndarray, crops: list[torch.Tensor]
) -> list[tuple[int, BadImage]]:
    """Writes all crops of the pictures, {place in the batch: picture}; returns the places of those that fail."""
    if not pictures:
        return []
    places, groups = list(pictures), list(zip(spec.groups, _group_slices(spec), crops, strict=True))
    sizes_B2 = np.array([[picture.height, picture.width] for picture in pictures.values()])
    boxes_of_groups = [_boxes(group, u_VBn[views, places], sizes_B2, spec).swapaxes(0, 1) for group, views, _ in groups]
    # Clean views choose their own: they then depend on nothing random, and the others not on them.
    shrinks = {
        clean: _largest_shrinks(boxes_of_groups, spec, clean) for clean in {g.center is not None for g in spec.groups}
    }
    mirrored = flips_VB[:, places].T.tolist()
    failed = []
    for at, (place, picture) in enumerate(pictures.items()):
        decode = cache(picture.decode)
        try:
            images = {clean: decode(shrinks[clean][at]) for clean in shrinks}
        except BadImage as error:
            failed.append((place, error))
            continue
        for (group, views, out), boxes_BV4 in zip(groups, boxes_of_groups, strict=True):
            image_CHW, boxes_V4 = images[group.center is not None], boxes_BV4[at]
            if image_CHW.shape[1:] != (picture.height, picture.width):
                boxes_V4 = _shrunk(boxes_V4, sizes_B2[at], image_CHW)
            for view, box in enumerate(boxes_V4.tolist()):
                crop_CHW = crop_resize(image_CHW, box, group.size)
                out[view, place] = crop_CHW.flip(-1) if mirrored[at][views.start + view] else crop_CHW
    return failed


def _largest_shrinks(boxes_of_groups: list[np.ndarray], spec: ViewSpec, clean: bool) -> list[int]:
    """How much smaller each image may be decoded so that no clean, or no other, crop is enlarged that was not before.

    boxes_of_groups: int64 (B, V, 4) each.
    """
    spares_B = np.min(
        [
            (boxes_BV4[..., 2:] / group.size).min((1, 2))
            for boxes_BV4, group in zip(boxes_of_groups, spec.groups, strict=True)
            if group.count and (group.center is not None) == clean
        ],
        axis=0,
    )
    return [next((shrink for shrink in _SHRINKS if shrink <= spare), 1) for spare in spares_B.tolist()]


def _shrunk(boxes_V4: np.ndarray, size: np.ndarray, image_CHW: torch.Tensor) -> np.ndarray:
    """Boxes drawn on an image of `size` (height, width), on the same image as it was decoded."""
    decoded = np.array(image_CHW.shape[-2:])
    factor = decoded / size
    starts = np.minimum(np.rint(boxes_V4[:, :2] * factor), decoded - 1)
    lengths = np.clip(np.rint(boxes_V4[:, 2:] * factor), 1, decoded - starts)
    return np.concatenate([starts, lengths], axis=1).astype(np.int64)


def crop_resize(image_CHW: torch.Tensor, box: list[int], size: tuple[int, int]) -> torch.Tensor:
    """One crop, bicubic and antialiased as in Pillow: (C, H, W) of the image's type.

    box: top, left, height, width in pixels.
    """
    top, left, height, width = box
    crop_CHW = image_CHW[:, top : top + height, left : left + width]
    return crop_CHW if (height, width) == tuple(size) else resize(crop_CHW, size)
