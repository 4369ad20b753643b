"""Image retrieval on frozen features: are the nearest images of the same class?"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sd.errors import UserError

_PRODUCTS = 2**23  # similarities held at a time


class RetrievalResult(NamedTuple):
    """Of every query that has an image to find, float64 and 0 to 1.

    average_precision_N: the area under precision over recall. recall_N: {k: whether one of the k nearest images is of
    the query's class}, which is what "recall at k" means where one match is enough (Jegou et al. 2011).
    """

    average_precision_N: Tensor
    recall_N: dict[int, Tensor]


@torch.inference_mode()
def retrieval(
    queries_ND: Tensor,
    query_labels_N: Tensor,
    bank_ND: Tensor,
    bank_labels_N: Tensor,
    k: Sequence[int] = (1, 5, 10),
    own_from: int | None = None,
) -> RetrievalResult:
    """Every query's ranking of the whole bank by cosine similarity; of equally near images the earlier one first.

    own_from: the queries are the bank's images from this one on, and no query finds itself. Average precision is the
    mean, over the images of the query's class, of the precision at each one's rank: nothing is interpolated. float64
    stays float64, anything else is computed in float32 on the bank's device. Raises UserError on missing labels,
    features that are not finite, and a k that is not from 1 to the number of images in the bank.
    """
    ks, found_in = sorted(set(k)), len(bank_ND) - (own_from is not None)
    if not ks or ks[0] < 1 or ks[-1] > found_in:
        raise UserError(f"k={ks}: expected numbers from 1 to {found_in}, the images there are to find")
    check("query", queries_ND, query_labels_N)
    check("bank", bank_ND, bank_labels_N)
    device, dtype = bank_ND.device, torch.float64 if bank_ND.dtype == torch.float64 else torch.float32
    bank_ND, bank_labels_N = F.normalize(bank_ND.to(dtype), dim=1), bank_labels_N.to(device)
    place_M = torch.arange(1, len(bank_ND) + 1, device=device, dtype=dtype)
    precisions, hits = [], []
    step = max(1, _PRODUCTS // len(bank_ND))
    for start in range(0, len(queries_ND), step):
        rows_NM = F.normalize(queries_ND[start : start + step].to(device, dtype), dim=1) @ bank_ND.T
        same_NM = query_labels_N[start : start + step, None].to(device) == bank_labels_N
        if own_from is not None:
            own_N = torch.arange(len(rows_NM), device=device)
            rows_NM[own_N, own_from + start + own_N] = -torch.inf
            same_NM[own_N, own_from + start + own_N] = False
        same_NM = same_NM.gather(1, rows_NM.argsort(dim=1, descending=True, stable=True))
        found_NM = same_NM.cumsum(1, dtype=torch.int32)
        precisions.append(((found_NM / place_M) * same_NM).sum(1) / found_NM[:, -1])  # 0 / 0 where nothing is to find
        hits.append(torch.stack([found_NM[:, count - 1] > 0 for count in ks], 1))
    precision_N = torch.cat(precisions).double() if precisions else place_M[:0].double()
    hits_NK = torch.cat(hits).double() if hits else place_M.new_zeros(0, len(ks)).double()
    known_N = ~precision_N.isnan()
    recall = {count: hits_NK[known_N, place] for place, count in enumerate(ks)}
    return RetrievalResult(precision_N[known_N], recall)


def check(name: str, features_ND: Tensor, labels_N: Tensor) -> None:
    """Raises UserError on missing labels and features that are not finite. name: of the set."""
    if bool((labels_N < 0).any()):
        raise UserError(f"retrieval: {name} images without a label; it needs one for every image")
    if not bool(torch.isfinite(features_ND.sum(1, dtype=torch.float32)).all()):
        raise UserError(f"retrieval: {name} features hold NaN or infinity; the model is broken or diverged")
