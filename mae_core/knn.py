"""Weighted k-nearest-neighbour classification (Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination").

Shapes: N training images, M queries, D width, K classes, k neighbours.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_core.features import Features
from mae_core.world import World

TEMPERATURE = 0.07
_MAX_NUMBERS = 2**24  # of one intermediate tensor
_QUERIES_PER_ROUND = 1024  # of one worker


def knn_scores(
    train_ND: Tensor, train_labels_N: Tensor, queries_MD: Tensor, *, k: int, temperature: float = TEMPERATURE, num_classes: int
) -> Tensor:
    """Votes (M, K): each of the `k` training images nearest by cosine similarity votes for its class with exp(similarity / temperature).

    Of equally near images the first ones vote; where there are fewer than `k`, all do. Memory beyond the arguments stays bounded.
    """
    k = min(k, len(train_ND))
    train_ND, queries_MD = F.normalize(train_ND), F.normalize(queries_MD)
    chunk = max(1, _MAX_NUMBERS // max(len(train_ND), k * num_classes))
    votes = []
    for part_QD in torch.split(queries_MD, chunk):
        similarity_QN = part_QD @ train_ND.T
        nearest_Qk = _nearest(similarity_QN, k)
        weights_Qk = (similarity_QN.gather(1, nearest_Qk) / temperature).exp()
        ballots_QkK = F.one_hot(train_labels_N[nearest_Qk], num_classes).to(weights_Qk.dtype)
        votes.append((weights_Qk[:, None] @ ballots_QkK)[:, 0])
    return torch.cat(votes) if votes else train_ND.new_zeros(0, num_classes)


def _nearest(similarity_QN: Tensor, k: int) -> Tensor:
    """Columns (Q, k), rising, of the `k` largest of each row; of equal ones the first, which topk alone leaves open."""
    values_Qk, columns_Qk = similarity_QN.topk(k, dim=1)
    nearest_Qk, least_Q1 = columns_Qk.sort(dim=1).values, values_Qk[:, -1:]
    open_Q = (similarity_QN >= least_Q1).sum(dim=1) > k
    nearest_Qk[open_Q] = _first_nearest(similarity_QN[open_Q], least_Q1[open_Q], k)
    return nearest_Qk


def _first_nearest(similarity_QN: Tensor, least_Q1: Tensor, k: int) -> Tensor:
    """`_nearest` of rows in which more than `k` are at least as near as `least_Q1`."""
    above_QN, level_QN = similarity_QN > least_Q1, similarity_QN == least_Q1
    room_Q1 = k - above_QN.sum(dim=1, keepdim=True)
    chosen_QN = above_QN | (level_QN & (level_QN.cumsum(dim=1) <= room_Q1))
    return chosen_QN.nonzero()[:, 1].reshape(-1, k)


def num_knn_rounds(num_queries: int, world: World) -> int:
    """Rounds of `knn_rounds`."""
    return -(-num_queries // (_QUERIES_PER_ROUND * world.size))


def knn_rounds(train: Features, held_back: Features, *, k: int, num_classes: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """(scores_BK, labels_B) of each held-back image once, the workers taking turns; equal bit for bit for any number of them.

    A score is the logarithm of the votes: a class without any has -inf, and is no guess.
    """
    for first in range(0, len(held_back.labels_N), _QUERIES_PER_ROUND * world.size):
        start = first + world.rank * _QUERIES_PER_ROUND
        queries_BD, labels_B = (each[start : start + _QUERIES_PER_ROUND] for each in held_back)
        yield knn_scores(*train, queries_BD, k=k, num_classes=num_classes).log(), labels_B
