"""Nearest neighbours: exact against brute force, faiss against exact, ties, copies and bad input."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_worlds import gaussian, rng

from gambeson.errors import UserError
from gambeson.quality import neighbours
from gambeson.quality.neighbours import Approximate, Exact, Index, nearest_of, nearest_others


def brute(queries, features, k):
    apart = (queries.double()[:, None] - features.double()[None]).norm(dim=2)
    values, places = apart.sort(dim=1, stable=True)
    return values[:, :k].float(), places[:, :k]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(0, 99),
    st.sampled_from([(512, 16384), (7, 5)]),
)
def test_exact_equals_brute_force_in_any_blocks(queries, count, d, seed, blocks):
    g, k = rng(seed), min(count, 4)
    q, f = torch.randn(queries, d, generator=g), torch.randn(count, d, generator=g)
    kept = neighbours.ROWS, neighbours.COLUMNS
    neighbours.ROWS, neighbours.COLUMNS = blocks
    try:
        distances, positions = Exact(f).nearest(q, k)
    finally:
        neighbours.ROWS, neighbours.COLUMNS = kept
    expected = brute(q, f, k)
    assert torch.equal(positions, expected[1])
    assert torch.allclose(distances, expected[0], rtol=1e-6)
    assert distances.dtype == torch.float32
    assert positions.dtype == torch.int64


def test_an_equal_image_is_at_distance_0_however_large_its_features():
    f = gaussian(300, 50, rng(0), shift=3000.0).features
    distances, positions = Exact(f).nearest(f, 2)
    assert (distances[:, 0] == 0).all()
    assert torch.equal(positions[:, 0], torch.arange(300))
    assert (distances[:, 1] > 1).all()


def test_equally_near_images_come_in_their_order():
    f = torch.tensor([[5.0], [1.0], [-1.0], [1.0], [5.0]])
    distances, positions = Exact(f).nearest(torch.zeros(1, 1), 5)
    assert positions.tolist() == [[1, 2, 3, 0, 4]]
    assert distances.tolist() == [[1, 1, 1, 5, 5]]


def test_an_image_is_no_neighbour_of_itself_but_its_twin_is():
    f = torch.tensor([[0.0], [0.0], [0.0], [3.0], [7.0]])
    found = nearest_others(f, 2)
    assert found.distances.tolist() == [[0, 0], [0, 0], [0, 0], [3, 3], [4, 7]]
    assert all(i not in row for i, row in enumerate(found.positions.tolist()))
    one = nearest_others(f, 1)  # three equal images, and room for two: one of them does not see itself
    assert one.distances[:, 0].tolist() == [0, 0, 0, 3, 4]
    assert all(i not in row for i, row in enumerate(one.positions.tolist()))


def test_the_index_is_exact_up_to_a_number_of_pairs_and_says_which():
    f = gaussian(600, 6, rng(0)).features
    exact, other = nearest_of(f[:50], f, 3), nearest_of(f[:50], f, 3, exact_pairs=29_999)
    assert exact.method == "exact"
    assert nearest_of(f[:50], f, 3, exact_pairs=30_000).method == "exact"
    assert other.method == "approximate (faiss, 15 of 15 cells)"
    assert torch.equal(exact.positions, other.positions)  # all cells are looked into
    assert isinstance(Exact(f), Index)
    assert isinstance(Approximate(f), Index)
    assert len(Approximate(f)) == len(Exact(f)) == 600


def test_faiss_finds_most_neighbours_every_copy_and_the_same_ones_again():
    f = gaussian(6000, 8, rng(0)).features
    q = torch.cat([f[:200], gaussian(200, 8, rng(1)).features])
    index = Approximate(f, probes=16)
    assert index.index.nlist == 153
    distances, positions = index.nearest(q, 5)
    expected = Exact(f).nearest(q, 5)
    recall = (positions[:, :, None] == expected[1][:, None, :]).any(2).float().mean().item()
    assert recall > 0.9  # seen: 0.96
    assert torch.equal(positions[:200, 0], torch.arange(200))
    assert (distances[:200, 0] == 0).all()
    assert (distances >= expected[0] - 1e-6).all()
    again = Approximate(f, probes=16).nearest(q, 5)
    assert torch.equal(positions, again[1])


def test_cells_that_hold_too_few_images_are_no_reason_to_miss_some():
    f = gaussian(400, 2, rng(0)).features
    distances, positions = Approximate(f, cells=10, probes=1).nearest(f[:20], 390)
    assert torch.equal(positions, Exact(f).nearest(f[:20], 390)[1])
    assert (positions >= 0).all()
    assert distances.isfinite().all()


def test_bad_input_is_refused():
    f = torch.zeros(4, 3)
    with pytest.raises(UserError, match=r"at least 5 images to search, got 4"):
        nearest_of(f, f, 5)
    with pytest.raises(UserError, match=r"at least 5 images to search, got 4"):
        nearest_others(f, 4)
    with pytest.raises(UserError, match=r"features \[B, 3\]"):
        nearest_of(torch.zeros(2, 4), f)
    with pytest.raises(UserError, match="at least 1"):
        nearest_of(f, f, 0)


def test_a_missing_faiss_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"gambeson\[index\]"):
        nearest_of(torch.zeros(9, 2), torch.zeros(9, 2), exact_pairs=10)
