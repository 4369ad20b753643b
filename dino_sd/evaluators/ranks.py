"""How features fill their space, told without labels: RankMe, LiDAR, alpha-ReQ, uniformity and alignment."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sd.errors import UserError
from dino_sd.health import effective_rank

_ROWS = 2048  # of the matrix of pairs at a time


@torch.no_grad()
def ranks(features_ND: Tensor, views_NVD: Tensor) -> dict[str, float]:
    """{"rankme", "alpha", "uniformity", "lidar", "alignment"}; see the functions of these names.

    features_ND: of different images, as the model gives them. views_NVD: of V views of each of N images. Computed in
    float64 on the CPU. Raises UserError on fewer than two images or views, and on features that are not finite.
    """
    if len(features_ND) < 2 or views_NVD.shape[0] < 2 or views_NVD.shape[1] < 2:
        raise UserError("ranks: needs at least two images and two views of each")
    features_ND, views_NVD = features_ND.cpu().double(), views_NVD.cpu().double()
    if not bool(features_ND.isfinite().all()) or not bool(views_NVD.isfinite().all()):
        raise UserError("ranks: features hold NaN or infinity; the model is broken or diverged")
    return {
        "rankme": effective_rank(features_ND).item(), "lidar": lidar(views_NVD), "alpha": alpha_req(features_ND),
        "uniformity": uniformity(features_ND), "alignment": alignment(views_NVD),
    }  # fmt: skip


def lidar(views_NVD: Tensor, delta: float = 1e-4) -> float:
    """The effective rank of what tells images apart, measured in what does not tell views of one image apart.

    With every image a class of its own: S_b is the covariance of the images' mean features, S_w the mean covariance of
    a mean's views, plus delta on the diagonal; the exponential of the entropy of the eigenvalues of S_w^-1/2 S_b
    S_w^-1/2, taken as shares of their sum. 1 to min(N - 1, D). Thilak et al. 2023, eq. 2 to 5.
    """
    mean_ND = views_NVD.mean(1)
    between_ND = mean_ND - mean_ND.mean(0)
    within_MD = (views_NVD - mean_ND[:, None]).flatten(0, 1)
    spread_DD = within_MD.T @ within_MD / len(within_MD) + delta * torch.eye(views_NVD.shape[2]).to(within_MD)
    values_D, vectors_DD = torch.linalg.eigh(spread_DD)
    whitened_ND = between_ND @ (vectors_DD / values_D.sqrt())
    # a symmetric matrix's singular values are its eigenvalues, whose shares are wanted; a rotation changes none
    return effective_rank(whitened_ND.T @ whitened_ND).item()


def alpha_req(features_ND: Tensor) -> float:
    """How fast the covariance's eigenvalues fall: lambda_i ~ i^-alpha; around 1 is best, larger is less of a spread.

    Least squares of log lambda_i on log i over all eigenvalues above 1e-10 of the largest (the paper leaves the choice
    of the range open); NaN where fewer than two are. Agrawal et al. 2022, section 3.
    """
    centered_ND = features_ND - features_ND.mean(0)
    values = torch.linalg.svdvals(centered_ND).square()
    values = values[values > 1e-10 * values[0]]
    if len(values) < 2:
        return math.nan
    x, y = torch.arange(1, len(values) + 1).double().log(), values.log()
    x, y = x - x.mean(), y - y.mean()
    return -(x @ y / (x @ x)).item()


def uniformity(features_ND: Tensor, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|^2) over all pairs of unit-length features of different images.

    0 where all are one point, about -2 t (1 - 1 / D) for features spread evenly; lower is more even. Wang and Isola
    2020, eq. 2.
    """
    unit_ND, total = F.normalize(features_ND, dim=1), 0.0
    for start in range(0, len(unit_ND), _ROWS):
        part_MD = unit_ND[start : start + _ROWS]
        potential_MN = ((part_MD @ unit_ND.T - 1) * (2 * t)).exp_()
        total += potential_MN.tril_(start - 1).sum().item()  # each pair once
    return math.log(total / (len(unit_ND) * (len(unit_ND) - 1) / 2))


def alignment(views_NVD: Tensor) -> float:
    """Mean of |x - y|^2 over all pairs of unit-length features of two views of one image; 0 is best.

    Wang and Isola 2020, eq. 1 with alpha = 2.
    """
    unit_NVD = F.normalize(views_NVD, dim=2)
    views = unit_NVD.shape[1]
    # the sum of |x - y|^2 over ordered pairs is 2 V sum |x|^2 - 2 |sum x|^2
    squares_N = 2 * views * unit_NVD.square().sum((1, 2)) - 2 * unit_NVD.sum(1).square().sum(1)
    return (squares_N / (views * (views - 1))).mean().item()
