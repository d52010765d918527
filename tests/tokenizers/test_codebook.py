"""The codebook's mechanics beside a plain implementation."""

import pytest
import torch
from torch.nn.functional import normalize

from beit.tokenizers import codebook


def vectors_and_means(unit):
    generator = torch.Generator().manual_seed(0)
    vectors, means = torch.randn(200, 5, generator=generator), torch.randn(12, 5, generator=generator)
    means[3] = 100.0  # nearest to nothing
    return (normalize(vectors, dim=1), normalize(means, dim=1)) if unit else (vectors, means)


def test_the_nearest_code_is_that_of_the_smallest_distance_whatever_the_chunks(monkeypatch):
    vectors, means = vectors_and_means(unit=False)
    expected = torch.cdist(vectors.double(), means.double()).argmin(dim=1)
    assert torch.equal(codebook.nearest(vectors, means), expected)
    monkeypatch.setattr(codebook, "DISTANCES_AT_ONCE", 7 * len(means))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook.nearest(vectors, means), expected)


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_is_lloyds_algorithm_and_a_mean_without_vectors_stays(cosine):
    vectors, means = vectors_and_means(cosine)
    expected = means.double()
    for _ in range(4):
        ids = torch.cdist(vectors.double(), expected).argmin(dim=1)
        for code in ids.unique().tolist():
            centre = vectors[ids == code].double().mean(dim=0)
            expected[code] = normalize(centre, dim=0) if cosine else centre
    moved, counts = codebook.kmeans(vectors, means, 4, cosine=cosine)
    torch.testing.assert_close(moved.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts.long(), torch.bincount(ids, minlength=len(means)))
    if not cosine:
        assert torch.equal(moved[3], means[3])


def test_draws_each_vector_once_if_there_are_enough():
    vectors = torch.arange(6.0).unsqueeze(1)
    assert sorted(codebook.draw(vectors, 6).flatten().tolist()) == list(range(6))
    assert len(codebook.draw(vectors, 9)) == 9
