import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from mae_core import knn
from mae_core.features import Features
from mae_core.knn import TEMPERATURE, knn_rounds, knn_scores, num_knn_rounds
from mae_core.world import World


def random_features(num: int, *, seed: int, width: int = 6, num_classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, width, generator=generator), torch.randint(num_classes, (num,), generator=generator)


def votes(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp((1 - distances) / TEMPERATURE)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_are_those_of_scikit_learn(k: int) -> None:
    (train, labels), (queries, _) = random_features(60, seed=1), random_features(17, seed=2)
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=votes).fit(train.double().numpy(), labels.numpy())
    ours = knn_scores(train, labels, queries, k=k, num_classes=3)
    expected = torch.tensor(theirs.predict_proba(queries.double().numpy()), dtype=torch.float32)
    torch.testing.assert_close(ours / ours.sum(dim=1, keepdim=True), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 100, 250])
def test_chunks_change_nothing_but_rounding(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (train, labels), (queries, _) = random_features(60, seed=1), random_features(17, seed=2)
    at_once = knn_scores(train, labels, queries, k=7, num_classes=3)
    monkeypatch.setattr(knn, "_MAX_NUMBERS", limit)
    torch.testing.assert_close(knn_scores(train, labels, queries, k=7, num_classes=3), at_once, rtol=1e-4, atol=0)


def test_a_long_and_a_short_vector_of_one_direction_are_equally_near() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    scores = knn_scores(train, torch.tensor([0, 1]), torch.tensor([[5.0, 5.0]]), k=2, num_classes=2)
    assert scores[0, 0] == pytest.approx(scores[0, 1])


def test_of_equally_near_images_the_first_ones_vote() -> None:
    train, labels = torch.ones(50, 3), torch.tensor([0, 1, *[2] * 48])
    assert (knn_scores(train, labels, torch.ones(1, 3), k=2, num_classes=3) > 0).tolist() == [[True, True, False]]
    nearest = torch.cat([train, torch.tensor([[1.0, 1.0, 1.001], [1.0, 0.9, 1.0]])])  # not the same direction: later, and not as near
    scores = knn_scores(nearest, torch.cat([labels, torch.tensor([2, 2])]), torch.ones(1, 3), k=2, num_classes=3)
    assert (scores > 0).tolist() == [[True, True, False]]


def test_with_fewer_images_than_neighbours_all_vote() -> None:
    train, labels = random_features(4, seed=1)
    scores = knn_scores(train, labels, train, k=100, num_classes=3)
    assert torch.equal(scores, knn_scores(train, labels, train, k=4, num_classes=3))
    assert ((scores > 0).sum(dim=0) == torch.tensor([4 if label in labels else 0 for label in range(3)])).all()


def test_no_queries() -> None:
    train, labels = random_features(4, seed=1)
    assert knn_scores(train, labels, torch.zeros(0, 6), k=2, num_classes=3).shape == (0, 3)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_share_the_queries_and_score_them_like_one(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_QUERIES_PER_ROUND", 4)
    train, held_back = (Features(*random_features(num, seed=num)) for num in (30, 11))
    worlds = [World(rank, num_workers) for rank in range(num_workers)]
    seen = [list(knn_rounds(train, held_back, k=3, num_classes=3, world=world)) for world in worlds]
    assert {len(rounds) for rounds in seen} == {num_knn_rounds(11, worlds[0])}
    in_turn = [part for parts in zip(*seen, strict=True) for part in parts]
    alone = list(knn_rounds(train, held_back, k=3, num_classes=3, world=World()))
    assert torch.equal(torch.cat([labels for _, labels in in_turn]), held_back.labels_N)
    assert torch.equal(torch.cat([scores for scores, _ in in_turn]), torch.cat([scores for scores, _ in alone]))


def test_a_class_without_votes_is_no_guess() -> None:
    train = Features(torch.eye(3), torch.tensor([0, 1, 2]))
    ((scores, _),) = knn_rounds(train, Features(torch.eye(3)[:1], torch.tensor([0])), k=1, num_classes=3, world=World())
    assert (scores > -torch.inf).tolist() == [[True, False, False]]
