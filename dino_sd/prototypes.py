"""Which prototypes of a DINO head a set of images uses, and which images excite them most."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino_sd.errors import UserError


class Used(NamedTuple):
    """prototypes_K: their numbers, most used first. share_K: of the images. used: how many prototypes some image uses.

    images_KN: rows of the features that excite each most; scores_KN: their logits, less the mean over all images.
    """

    prototypes_K: Tensor
    share_K: Tensor
    used: int
    images_KN: Tensor
    scores_KN: Tensor


@torch.inference_mode()
def most_used(projection: nn.Module, features_ND: Tensor, count: int, images: int, chunk: int = 512) -> Used:
    """The `count` most used prototypes, each with the `images` rows that excite it most; all on the CPU.

    projection: (N, D) -> (N, prototypes) logits. An image uses the prototype with its largest logit once the mean over
    all images is taken off, as the teacher's centre does (Caron et al. 2021, eq. 4). Memory: chunk x prototypes. Raises
    UserError where the features are not of the head's width.
    """
    device = next(projection.parameters(), torch.empty(0)).device
    total_K = sum(logits_NK.double().cpu().sum(0) for logits_NK in _logits(projection, features_ND, chunk, device))
    assert isinstance(total_K, Tensor)
    mean_K = (total_K / len(features_ND)).float().to(device)
    uses_K = torch.zeros(len(mean_K), dtype=torch.int64)
    for logits_NK in _logits(projection, features_ND, chunk, device):
        uses_K += torch.bincount((logits_NK - mean_K).argmax(1).cpu(), minlength=len(mean_K))
    chosen_K = uses_K.argsort(descending=True, stable=True)[: min(count, int((uses_K > 0).sum()))]
    scores_NK = torch.cat(
        [
            (logits_NK - mean_K)[:, chosen_K.to(device)].cpu()
            for logits_NK in _logits(projection, features_ND, chunk, device)
        ]
    )
    scores_KN, images_KN = scores_NK.T.sort(dim=1, descending=True, stable=True)
    share_K = uses_K[chosen_K].double() / len(features_ND)
    return Used(chosen_K, share_K, int((uses_K > 0).sum()), images_KN[:, :images], scores_KN[:, :images])


def _logits(projection: nn.Module, features_ND: Tensor, chunk: int, device: torch.device) -> Iterator[Tensor]:
    for part_ND in features_ND.split(chunk):
        try:
            logits_NK = projection(part_ND.to(device)).float()
        except RuntimeError as error:
            raise UserError(
                f"prototypes: the head does not fit features {features_ND.shape[1]} wide ({error})"
            ) from None
        yield logits_NK
