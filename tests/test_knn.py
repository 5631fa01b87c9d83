"""Nearest-neighbour accuracy against scikit-learn, across the borders of the chunks it is computed in."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from lmim.eval import knn


def labelled(count: int, seed: int, classes: int = 7, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy points around one centre a class, of any length, so that accuracies lie well between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, classes, (count,), generator=generator)
    points = centres[labels] + 1.5 * torch.randn(count, dim, generator=generator)
    return points * (0.1 + 9 * torch.rand(count, 1, generator=generator)), labels


@pytest.fixture(params=[1, 7, 50, 1024])
def chunk(request, monkeypatch):
    monkeypatch.setattr(knn, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
def test_leave_one_out_is_scikit_learns():
    points, labels = labelled(150, seed=1)
    search = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(points.double().numpy())
    nearest = search.kneighbors(return_distance=False)[:, 0]  # without X: a point is not its own neighbour
    expected = (labels.numpy()[nearest] == labels.numpy()).mean()
    assert 0.2 < expected < 0.9
    assert knn.leave_one_out(points, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (5, 0.02)])
def test_gallery_is_scikit_learns_weighted_vote(k, temperature):
    points, labels = labelled(150, seed=2)
    gallery_points, gallery_labels = labelled(230, seed=3)
    vote = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature))
    vote.fit(gallery_points.double().numpy(), gallery_labels.numpy())
    expected = vote.score(points.double().numpy(), labels.numpy())
    assert 0.2 < expected < 0.95
    got = knn.gallery(points, labels, gallery_points, gallery_labels, k=k, temperature=temperature)
    assert got == pytest.approx(expected, abs=1e-12)


def test_a_sharp_temperature_means_the_nearest_neighbour():
    points, labels = labelled(60, seed=2)
    options = dict(gallery_features=labelled(90, seed=3)[0], gallery_labels=labelled(90, seed=3)[1])
    one = knn.gallery(points, labels, **options, k=1, temperature=1.0)
    assert knn.gallery(points, labels, **options, k=20, temperature=1e-3) == one


def test_a_gallery_smaller_than_k_votes_as_a_whole():
    points, labels = labelled(40, seed=4)
    gallery_points, gallery_labels = labelled(9, seed=5)
    with_all = knn.gallery(points, labels, gallery_points, gallery_labels, k=9, temperature=0.07)
    assert knn.gallery(points, labels, gallery_points, gallery_labels, k=20, temperature=0.07) == with_all


def test_labels_that_only_one_side_knows_are_just_wrong():
    points, labels = torch.eye(3), torch.tensor([0, 5, 2])
    assert knn.gallery(points, labels, points, torch.tensor([0, 1, 2]), k=1, temperature=0.07) == pytest.approx(2 / 3)
    assert knn.gallery(points, torch.tensor([0, 1, 2]), points, labels, k=1, temperature=0.07) == pytest.approx(2 / 3)


def test_length_does_not_matter_and_ties_go_to_the_first():
    points = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 1.0], [0.0, 2.0]])
    assert knn.leave_one_out(points, torch.tensor([0, 1, 1, 2])) == pytest.approx(2 / 4)
    assert knn.leave_one_out(
        points * torch.tensor([[1.0], [9.0], [0.1], [5.0]]), torch.tensor([0, 1, 1, 2])
    ) == pytest.approx(2 / 4)
