"""Features in the plane: principal components against NumPy's SVD, neighbours in t-SNE, and classes in a legend."""

import sys

import numpy as np
import pytest
import torch

from beit.commands.settings import PROJECTIONS
from beit.errors import InputError
from beit.visualization.embeddings import METHODS, check_embedding, embed, group_by_class, pca


def test_principal_components_are_numpys_up_to_sign():
    # Broken by features that are not centred, and by directions in another order.
    features = torch.randn(40, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 5
    points, axes = pca(features)
    centred = features.numpy() - features.numpy().mean(axis=0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * lengths[:2]
    for axis in range(2):
        sign = np.sign((expected[:, axis] * points[:, axis].numpy()).sum())
        np.testing.assert_allclose(points[:, axis].numpy(), sign * expected[:, axis], atol=1e-9)
        share = lengths[axis] ** 2 / (lengths**2).sum()
        assert axes[axis] == f"component {axis + 1}: {share:.0%} of the variance"


def test_the_sign_is_always_the_same():
    features = torch.randn(40, 7, dtype=torch.float64)
    shuffled = torch.randperm(40)
    torch.testing.assert_close(pca(features[shuffled])[0], pca(features)[0][shuffled])


def test_features_that_are_all_alike_make_a_picture_all_the_same():
    assert torch.equal(embed(torch.ones(5, 3), "pca")[0], torch.zeros(5, 2, dtype=torch.float64))


def test_tsne_keeps_groups_together():
    centres = 20 * torch.eye(3, 60)
    labels = torch.arange(60) % 3
    points = embed(centres[labels] + 0.1 * torch.randn(60, 60), "tsne")[0]
    for label in range(3):
        own = points[labels == label]
        apart = torch.cdist(own, points[labels != label]).min()
        assert torch.cdist(own, own).max() < apart


def test_what_tsne_needs_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(InputError, match=r"pip install scikit-learn, or choose --method pca"):
        embed(torch.randn(9, 3), "tsne")
    with pytest.raises(InputError, match="pip install"):
        check_embedding(9, "tsne")  # before features are computed
    check_embedding(9, "pca")


def test_three_images_are_too_few():
    with pytest.raises(InputError, match="3 images"):
        embed(torch.randn(3, 8), "pca")


def test_the_most_frequent_classes_keep_their_names():
    # Class 2 has no image; of 0 (1 image), 1 (3), 3 (2), 4 (2) three are told apart: 1, 3, 4, in the order of classes.
    labels = torch.tensor([4, 1, 1, 3, 0, 4, 1, 3])
    groups = {name: where.tolist() for name, where in group_by_class(labels, list("abcde"), most=3)}
    assert groups == {"b": [1, 2, 6], "d": [3, 7], "e": [0, 5], "": [4]}
    assert [name for name, _ in group_by_class(labels, list("abcde"))] == ["a", "b", "d", "e"]


def test_every_method_is_a_choice_of_the_command():
    assert tuple(METHODS) == PROJECTIONS
