"""Features in few dimensions: principal components, a split in two, and coordinates for a map."""

from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sd.errors import UserError

NEIGHBOURS = 15  # of a point, in UMAP; its authors' default


class Components(NamedTuple):
    """mean_D, directions_KD (rows of length 1, largest variance first), share_K: of the variance. float64, CPU."""

    mean_D: Tensor
    directions_KD: Tensor
    share_K: Tensor

    def __call__(self, features_ND: Tensor) -> Tensor:
        """Coordinates along the directions, (N, K) float64."""
        return (features_ND.cpu().double() - self.mean_D) @ self.directions_KD.T


def principal_components(features_ND: Tensor, count: int) -> Components:
    """The directions of largest variance. Deterministic: the largest entry of each direction is positive.

    Where there are fewer than `count` dimensions, the rest are zeros.
    """
    features_ND = features_ND.cpu().double()  # MPS has no float64
    mean_D = features_ND.mean(0)
    centred_ND = features_ND - mean_D
    values_D, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / max(len(centred_ND), 1))
    directions_KD = vectors_DD.flip(1).T[:count]
    largest_K1 = directions_KD.gather(1, directions_KD.abs().argmax(1, keepdim=True))
    share_K = values_D.flip(0)[:count].clamp_min(0) / values_D.clamp_min(0).sum().clamp_min(1e-300)
    missing = count - len(directions_KD)
    return Components(
        mean_D, F.pad(directions_KD * largest_K1.sign(), (0, 0, 0, missing)), F.pad(share_K, (0, missing))
    )


def split_in_two(scores_N: Tensor) -> float:
    """The threshold that parts numbers into a low and a high group with the largest variance between them.

    Otsu 1979. Values above it are the high group; of equal numbers all are below.
    """
    sorted_N = scores_N.double().sort().values
    below_N = torch.arange(1, len(sorted_N) + 1, dtype=torch.float64)
    sums_N = sorted_N.cumsum(0)
    mean = sums_N[-1] / len(sorted_N)
    above_N = (len(sorted_N) - below_N).clamp_min(1)
    between_N = (mean * below_N - sums_N) ** 2 / (below_N * above_N)  # but for a constant
    between_N[-1] = 0.0  # one group
    return float(sorted_N[between_N.argmax()])


def coordinates(features_ND: Tensor, method: Literal["auto", "umap", "pca"], seed: int = 0) -> tuple[Tensor, str]:
    """Places of features on a map, float64 (N, 2), and what the axes are.

    Features are compared by their direction, as k-NN does. auto: UMAP where it is installed and there are enough
    images, PCA otherwise. McInnes et al. 2018. Raises UserError for umap where it is not installed.
    """
    features_ND = F.normalize(features_ND.float().cpu(), dim=1)
    if method != "pca" and len(features_ND) > NEIGHBOURS:
        try:
            import umap  # pyright: ignore[reportMissingImports]
        except ImportError:
            if method == "umap":
                raise UserError(
                    "method=umap needs umap-learn: pip install 'dino-sd[umap]', or use method=pca"
                ) from None
        else:
            reducer = umap.UMAP(n_neighbors=NEIGHBOURS, min_dist=0.1, metric="cosine", random_state=seed, n_jobs=1)
            return torch.from_numpy(np.asarray(reducer.fit_transform(features_ND.numpy()), dtype=np.float64)), "UMAP"
    elif method == "umap":
        raise UserError(f"method=umap needs more than {NEIGHBOURS} images, found {len(features_ND)}; use method=pca")
    components = principal_components(features_ND, 2)
    shares = " and ".join(f"{share:.0%}" for share in components.share_K.tolist())
    return components(features_ND), f"PCA: {shares} of the variance"
