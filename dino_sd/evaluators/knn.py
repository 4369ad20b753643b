"""Weighted k-nearest neighbours on frozen features, by the published protocol (Caron et al. 2021, appendix F.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sd.distributed import all_gather_rows, rank, world_size
from dino_sd.errors import UserError
from dino_sd.nearest import nearest


def knn(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
    classes: int | None = None,
    chunk: int = 1024,
    train_chunk: int = 8192,
    leave_one_out: bool = False,
) -> dict[int, tuple[float, float]]:
    """Accuracy of weighted k-NN voting: {k: (top1, top5)} in percent. Ranks share out the test images.

    Features are L2-normalised here; float64 stays float64, anything else is computed in float32, on the features'
    device. A neighbour votes exp(cosine / temperature) for its class. Works for any number of test images and classes
    (up to five classes, or k = 1, make top-5 say little: only the min(5, k) best classes count). Memory: chunk x
    train_chunk similarities beside the features, however many there are. leave_one_out: test and train are the same
    images, and none votes for itself. Raises UserError on a k above the number of train images, missing labels or
    features that are not finite.
    """
    if len(test_ND) == 0:
        raise UserError("knn: the test set has no images")
    check(  # all of it on every rank: one that raised alone would leave the others waiting
        train_ND, train_labels_N, test_ND, test_labels_N, sorted(set(k)), temperature, classes,
        len(train_ND) - leave_one_out,
    )  # fmt: skip
    share = slice(len(test_ND) * rank() // world_size(), len(test_ND) * (rank() + 1) // world_size())
    ranks = label_ranks(
        train_ND, train_labels_N, test_ND[share], test_labels_N[share], k, temperature, classes, chunk=chunk,
        train_chunk=train_chunk, own_from=share.start if leave_one_out else None,
    )  # fmt: skip
    return accuracy_from_ranks({count: all_gather_rows(ranks_N) for count, ranks_N in ranks.items()})


def accuracy_from_ranks(ranks: dict[int, Tensor]) -> dict[int, tuple[float, float]]:
    """{k: (top1, top5)} in percent, from the place of each test image's own class among the votes."""
    return {
        k: (
            100.0 * (ranks_N == 0).cpu().double().mean().item(),
            # with k < 5 only k classes can have been voted for; as published, no others are counted
            100.0 * (ranks_N < min(5, k)).cpu().double().mean().item(),
        )
        for k, ranks_N in ranks.items()
    }


@torch.inference_mode()
def label_ranks(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
    classes: int | None = None,
    *,
    chunk: int = 1024,
    train_chunk: int = 8192,
    own_from: int | None = None,
) -> dict[int, Tensor]:
    """{k: ranks_N}: the place (0 is first) of each test image's own class when classes are sorted by their votes.

    Each test image is judged by itself, so processes may share them out (a share may be empty). Equal votes are sorted
    by class index. own_from: the test images are the train images from this one on, and do not vote for themselves.
    Other arguments and errors as in `knn`.
    """
    ks = sorted(set(k))
    voters = len(train_ND) - (own_from is not None)
    classes = check(train_ND, train_labels_N, test_ND, test_labels_N, ks, temperature, classes, voters)
    device, dtype = train_ND.device, torch.float64 if train_ND.dtype == torch.float64 else torch.float32
    train_labels_N, test_labels_N = train_labels_N.to(device), test_labels_N.to(device)
    class_C = torch.arange(classes, device=device)
    ranks: dict[int, list[Tensor]] = {count: [] for count in ks}
    for start in range(0, len(test_ND), chunk):
        queries_ND = F.normalize(test_ND[start : start + chunk].to(device, dtype), dim=1)
        own_N1 = test_labels_N[start : start + chunk].unsqueeze(1)
        own_N = None
        if own_from is not None:
            own_N = torch.arange(own_from + start, own_from + start + len(queries_ND), device=device)
        similarity_NK, index_NK = nearest(train_ND, queries_ND, ks[-1], train_chunk, own_N)
        voted_NK = train_labels_N[index_NK]
        # measured from the nearest one, which changes no order: exp(1 / 0.01) is more than float32 can hold
        weight_NK = ((similarity_NK - similarity_NK[:, :1]) / temperature).exp()
        for count in ks:
            votes_NC = torch.zeros(len(queries_ND), classes, device=device, dtype=dtype)
            votes_NC.scatter_add_(1, voted_NK[:, :count], weight_NK[:, :count])
            own_votes_N1 = votes_NC.gather(1, own_N1)
            ahead_NC = (votes_NC > own_votes_N1) | ((votes_NC == own_votes_N1) & (class_C < own_N1))
            ranks[count].append(ahead_NC.sum(1))
    return {count: torch.cat(parts) if parts else class_C[:0] for count, parts in ranks.items()}


def check(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    ks: list[int],
    temperature: float,
    classes: int | None,
    voters: int,
) -> int:
    """Refuses what k-NN cannot work with; returns the number of classes."""
    if not ks or ks[0] < 1:
        raise UserError(f"k={ks}: expected one or more numbers of neighbours, each at least 1")
    if voters < ks[-1]:
        raise UserError(f"k={ks[-1]} neighbours, but {voters} train images may vote; use a k of at most that")
    if temperature <= 0:
        raise UserError(f"temperature={temperature}: expected a number above 0 (published: 0.07)")
    if train_ND.shape[1] != test_ND.shape[1]:
        raise UserError(f"knn: train features are {train_ND.shape[1]} wide, test features {test_ND.shape[1]}")
    for name, features_ND, labels_N in (("train", train_ND, train_labels_N), ("test", test_ND, test_labels_N)):
        if len(features_ND) != len(labels_N):
            raise UserError(f"knn: {len(features_ND)} {name} features but {len(labels_N)} labels")
        if bool((labels_N < 0).any()):
            raise UserError(f"knn: the {name} set has images without a label; k-NN needs a label for every image")
        if not bool(torch.isfinite(features_ND.sum(1, dtype=torch.float32)).all()):
            raise UserError(f"knn: {name} features hold NaN or infinity; the model is broken or diverged")
    found = 1 + max(int(labels_N.max()) for labels_N in (train_labels_N, test_labels_N) if len(labels_N))
    if classes is not None and classes < found:
        raise UserError(f"knn: label {found - 1} found, but the data has {classes} classes (0 to {classes - 1})")
    return classes or found
