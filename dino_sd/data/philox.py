"""Philox4x32-10, a counter-based generator: a random number is a pure function of where it is used.

Nothing is stored or advanced, so a view does not depend on the number of workers or ranks, nor on where a run was cut.
Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the tests pin the authors' known answers.
"""

import numpy as np

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_WORD = 0xFFFFFFFF
ROUNDS = 10


def philox4x32(counter: tuple, key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Four random 32-bit words per counter.

    counter: four uint64 arrays (of any shapes that broadcast) holding 32-bit words. key: two 32-bit integers.
    Returns four uint64 arrays holding 32-bit words.
    """
    word_0, word_1, word_2, word_3 = counter
    key_0, key_1 = key
    for _ in range(ROUNDS):
        product_0, product_1 = word_0 * _MULTIPLIER_0, word_2 * _MULTIPLIER_1
        word_0 = (product_1 >> _SHIFT) ^ word_1 ^ np.uint64(key_0)
        word_2 = (product_0 >> _SHIFT) ^ word_3 ^ np.uint64(key_1)
        word_1, word_3 = product_1 & _LOW, product_0 & _LOW
        key_0, key_1 = (key_0 + _WEYL_0) & _WORD, (key_1 + _WEYL_1) & _WORD
    return word_0, word_1, word_2, word_3


def uniforms(seed: int, epoch: int, images_N: np.ndarray, view: int | np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in (0, 1) for every image: a pure function of (seed, epoch, image, view).

    images_N: image indices, below 2^32. view: one view index, or one per image. seed: its low 64 bits count.
    Returns float64 (N, count).
    """
    images_N1 = np.asarray(images_N).astype(np.uint64).reshape(-1, 1)
    views = np.asarray(view).astype(np.uint64).reshape(-1, 1)
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    epoch_word = np.full((1, 1), epoch & _WORD, dtype=np.uint64)
    # Every word starts at the full shape: a word that broadcasts would only delay the growth by two rounds.
    counter = tuple(np.broadcast_arrays(blocks, views, images_N1, epoch_word))
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    words_N = np.stack(words, axis=-1).reshape(len(images_N1), -1)[:, :count]
    # The half keeps 0 and 1 out, so that logarithms and scalings need no guard.
    return (words_N + 0.5) * 2.0**-32
