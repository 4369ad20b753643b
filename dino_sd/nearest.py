"""The nearest rows of a bank of features, exactly and in little memory."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def nearest(
    train_ND: Tensor, queries_ND: Tensor, k: int, train_chunk: int = 16384, own_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and train indices of each query's k nearest train rows, nearest first.

    queries_ND: L2-normalised; train_ND need not be. Of equally near rows the one with the lower index comes first.
    own_N: int64, the train row that is each query itself, and no neighbour of it; k is then below the number of train
    rows. Returns similarity_NK in the queries' dtype and index_NK (int64). Memory: queries x train_chunk.
    """
    count, device = len(queries_ND), queries_ND.device
    best_NK = queries_ND.new_empty(count, 0)
    index_NK = torch.empty(count, 0, dtype=torch.int64, device=device)
    products = queries_ND.new_empty(count * min(train_chunk, len(train_ND)))  # written again for every block
    for start in range(0, len(train_ND), train_chunk):
        # normalised block by block: the train features are never held twice
        block_ND = F.normalize(train_ND[start : start + train_chunk].to(queries_ND), dim=1)
        similarity_NM = products[: count * len(block_ND)].view(count, -1)
        with torch.autocast(device.type, enabled=False):
            torch.mm(queries_ND, block_ND.T, out=similarity_NM)
        if own_N is not None:
            inside_n = ((own_N >= start) & (own_N < start + len(block_ND))).nonzero()[:, 0]
            similarity_NM[inside_n, own_N[inside_n] - start] = -torch.inf
        full = best_NK.shape[1] == k
        found = _above(similarity_NM, best_NK[:, -1:]) if full and count else None
        values_NK, columns_NK = found or top_of_block(similarity_NM, min(k, len(block_ND)))
        # earlier blocks stand first, so that a stable sort keeps equal similarities in the order of train indices
        both_NK = torch.cat([best_NK, values_NK], 1)
        both_index_NK = torch.cat([index_NK, columns_NK + start], 1)
        order_NK = both_NK.argsort(dim=1, descending=True, stable=True)[:, :k]
        best_NK, index_NK = both_NK.gather(1, order_NK), both_index_NK.gather(1, order_NK)
    return best_NK, index_NK


def _above(similarity_NM: Tensor, edge_N1: Tensor) -> tuple[Tensor, Tensor] | None:
    """What is nearer than the worst of the k known so far: few, once some blocks are through, and found by comparing.

    As `top_of_block`, rows filled up with -inf; None where a row has more of them than a full sort costs. An equal one
    is no gain: it comes later.
    """
    rows_J, columns_J = (similarity_NM > edge_N1).nonzero(as_tuple=True)
    found_N = torch.bincount(rows_J, minlength=len(similarity_NM))
    most = int(found_N.max())
    if most > max(256, similarity_NM.shape[1] // 16):
        return None
    place_J = torch.arange(len(rows_J), device=rows_J.device) - (found_N.cumsum(0) - found_N)[rows_J]
    values_NK = similarity_NM.new_full((len(similarity_NM), most), -torch.inf)
    columns_NK = columns_J.new_zeros(values_NK.shape)
    values_NK[rows_J, place_J] = similarity_NM[rows_J, columns_J]
    columns_NK[rows_J, place_J] = columns_J
    return values_NK, columns_NK


def top_of_block(similarity_NM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in the order of columns; of equal ones at the edge the first columns are taken.

    `topk` alone takes any of the equal ones, differently on every device and for every k.
    """
    values_NK, columns_NK = similarity_NM.topk(k, dim=1, sorted=True)
    edge_N1 = values_NK[:, -1:]
    tied_N = (similarity_NM >= edge_N1).sum(1) > k
    if tied_N.any():
        rows_NM, edge_N1 = similarity_NM[tied_N], edge_N1[tied_N]
        above_NM, at_edge_NM = rows_NM > edge_N1, rows_NM == edge_N1
        free_N1 = k - above_NM.sum(1, keepdim=True)
        taken_NM = above_NM | (at_edge_NM & (at_edge_NM.cumsum(1, dtype=torch.int32) <= free_N1))
        columns_NK[tied_N] = taken_NM.nonzero()[:, 1].view(-1, k)
    columns_NK = columns_NK.sort(dim=1).values
    return similarity_NM.gather(1, columns_NK), columns_NK
