"""Which images of many are the same, or nearly: by digest, and by difference hash and thumbnail."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

_AT_ONCE = 2048  # images that are compared each with each
_RESIDUAL = 0.01  # of the span: thumbnails of copies differ by less once brightness and contrast are made equal
_UNEXPLAINED = 0.03  # share of a thumbnail's variance that may be left then; decides where there is little contrast
_FLAT = 1 / 255  # of the span: standard deviation of a thumbnail that shows nothing


def same(digests_N: np.ndarray) -> list[list[int]]:
    """Groups of two or more places with equal digests, in order."""
    return [group.tolist() for group in _groups(np.unique(digests_N, return_inverse=True)[1])]


def flat(thumbnails_NHW: np.ndarray, span: float) -> np.ndarray:
    """Which thumbnails show nothing: bool (N,). span: from dark to bright in the set."""
    return thumbnails_NHW.std((1, 2)) < _FLAT * span


def nearly_same(thumbnails_NHW: np.ndarray, near: int, span: float) -> list[list[int]]:
    """Groups of two or more places of images that look the same, in order; chains are one group.

    thumbnails_NHW: 8 x 9, none of them flat. near: most bits that may differ of the 64 of the difference hash: is a
    pixel brighter than its left neighbour? By the hash alone all trousers are the same, so thumbnails have to be, too,
    up to brightness and contrast. span: as in `flat`. Hashes that differ in few bits agree in one of near + 1 bands of
    bits: only images that share a band are compared, so that a million take minutes and not days.
    """
    bits_N64 = (thumbnails_NHW[:, :, 1:] > thumbnails_NHW[:, :, :-1]).reshape(-1, 64)
    pixels_NP = thumbnails_NHW.reshape(-1, 72).astype(np.float32) / span
    pixels_NP = pixels_NP - pixels_NP.mean(1, keepdims=True)
    group_of = list(range(len(bits_N64)))  # every image's parent in a forest; a root is its group

    def root(place: int) -> int:
        while group_of[place] != place:
            group_of[place] = group_of[group_of[place]]
            place = group_of[place]
        return place

    for members in _buckets(bits_N64, np.arange(len(bits_N64)), np.arange(bits_N64.shape[1]), near):
        first_m = _first_alike(bits_N64[members], pixels_NP[members], near)
        for one, other in zip(members.tolist(), members[first_m].tolist(), strict=True):
            first, last = sorted((root(one), root(other)))
            group_of[last] = first
    roots_N = np.array([root(place) for place in range(len(group_of))], dtype=np.int64)
    return [group.tolist() for group in _groups(roots_N)]


def _buckets(bits_N64: np.ndarray, members: np.ndarray, open_bits: np.ndarray, near: int) -> Iterator[np.ndarray]:
    """Sets of at most _AT_ONCE members; any two that differ in at most `near` of the open bits are in one of them."""
    if len(members) <= _AT_ONCE:
        if len(members) > 1:
            yield members
        return
    found, pairs = [], 0
    for band in np.array_split(open_bits, near + 1) if len(open_bits) > near else ():
        rest = np.setdiff1d(open_bits, band)
        keys = np.zeros((len(members), 8), dtype=np.uint8)
        packed = np.packbits(bits_N64[members][:, band], axis=1)
        keys[:, : packed.shape[1]] = packed
        for bucket in _groups(keys.view(np.uint64)[:, 0]):
            found.append((members[bucket], rest))
            pairs += len(bucket) ** 2
    if pairs < len(members) ** 2 and len(open_bits) > near:
        for bucket, rest in found:
            yield from _buckets(bits_N64, bucket, rest, near)
    else:  # nothing is left that tells them apart, or it does not pay: most look the same
        blocks = np.array_split(members, -(-2 * len(members) // _AT_ONCE))
        yield from (np.concatenate(pair) for pair in combinations(blocks, 2))


def _first_alike(bits_M64: np.ndarray, pixels_MP: np.ndarray, near: int) -> np.ndarray:
    """The first of the places that each is connected to by steps between images that look the same: int64 (M,)."""
    signs_M64 = bits_M64.astype(np.float32) * 2 - 1
    few_bits = signs_M64 @ signs_M64.T >= bits_M64.shape[1] - 2 * near
    dot = pixels_MP @ pixels_MP.T
    power = np.diagonal(dot)
    # What is left of the one with more contrast when the other, times a factor, is taken from it.
    larger = np.maximum(power[:, None], power)
    left = larger - dot * dot / np.maximum(np.minimum(power[:, None], power), 1e-12)
    alike = few_bits & (dot > 0) & (left < np.minimum(_RESIDUAL**2 * pixels_MP.shape[1], _UNEXPLAINED * larger))
    np.fill_diagonal(alike, True)
    first_M = np.arange(len(alike))
    while True:
        earlier = np.where(alike, first_M, len(alike)).min(1)
        if np.array_equal(earlier, first_M):
            return first_M
        first_M = earlier


def _groups(names_N: np.ndarray) -> list[np.ndarray]:
    """Places of equal names, for names that come twice or more; groups in the order of their first places."""
    order = np.argsort(names_N, kind="stable")
    ends = np.flatnonzero(names_N[order][1:] != names_N[order][:-1]) + 1
    return sorted((group for group in np.split(order, ends) if len(group) > 1), key=lambda group: group[0])
