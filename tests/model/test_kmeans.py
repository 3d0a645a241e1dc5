"""K-means against scikit-learn and brute force; ranks, order and a restart change nothing.

Ranks are threads here; stages/test_cluster_labels.py has them as processes. Shape letters as in kmeans.py.
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sklearn.cluster import KMeans as ScikitKMeans

from seedling.model import kmeans
from seedling.model.kmeans import fit_kmeans, nearest_centroids


class Threads:
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, shared: list):
        self.rank, self.barrier, self.shared = rank, barrier, shared

    def gather(self, value):
        self.shared[self.rank] = value
        self.barrier.wait()
        everyones = list(self.shared)
        self.barrier.wait()
        return everyones

    def sum_integers(self, values):
        assert values.dtype == torch.int64
        return sum(self.gather(values))


def fit_on(ranks: int, frames, ids, *, owner_N, **settings) -> list:
    """Fit with frame i on rank owner_N[i]; return the result of every rank."""
    barrier, shared = threading.Barrier(ranks, timeout=600), [None] * ranks

    def run(rank: int):
        mine = owner_N == rank
        return fit_kmeans(frames[mine], ids[mine], ranks=Threads(rank, barrier, shared), **settings)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def blobs(N: int, D: int, centres: int, *, spread: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Frames around some centres, as layer outputs are neither one cloud nor neat clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres_CD = torch.randn(centres, D, generator=generator)
    which = torch.randint(centres, (N,), generator=generator)
    return centres_CD[which] + spread * torch.randn(N, D, generator=generator)


@pytest.mark.parametrize(("N", "D", "K"), [(1, 1, 1), (7, 3, 7), (501, 16, 33), (2000, 5, 257)])
@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_labels_are_the_nearest_centroids_by_brute_force(monkeypatch, N, D, K, chunk):
    monkeypatch.setattr(kmeans, "CHUNK_ELEMENTS", chunk)
    # Far from the origin, where |x|^2 - 2 x m + |m|^2 cancels.
    frames, centroids = blobs(N, D, 5) + 100, blobs(K, D, 5, seed=1) + 100
    squared_NK = (frames.double()[:, None] - centroids.double()).square().sum(-1)
    labels, distances = nearest_centroids(frames, centroids)
    assert torch.equal(labels, squared_NK.argmin(1))
    torch.testing.assert_close(distances, squared_NK.min(1).values, rtol=1e-7, atol=1e-9)


def test_of_equally_near_centroids_the_lowest_is_taken():
    grid = torch.tensor([[float(x), float(y)] for x in range(6) for y in range(6)])
    labels, _ = nearest_centroids(grid, grid[torch.tensor([7, 7, 14, 21, 14])])
    assert set(labels.tolist()) == {0, 2, 3}


def test_no_frames_have_no_labels():
    labels, distances = nearest_centroids(torch.zeros(0, 4), torch.zeros(3, 4))
    assert labels.shape == distances.shape == (0,) and labels.dtype == torch.int64


@pytest.mark.parametrize(("N", "D", "K", "centres"), [(3000, 12, 20, 20), (4000, 24, 50, 200), (3000, 8, 64, 7)])
def test_inertia_is_within_one_percent_of_scikit_learn(N, D, K, centres):
    frames = blobs(N, D, centres)
    found = fit_kmeans(frames, torch.arange(N), clusters=K, seed=1)
    theirs = [ScikitKMeans(K, n_init=1, random_state=seed).fit(frames.numpy()).inertia_ for seed in range(3)]
    assert found.inertia <= 1.01 * min(theirs)
    labels, _ = nearest_centroids(frames, found.centroids_KD)
    assert found.counts_K.tolist() == torch.bincount(labels, minlength=K).tolist()
    brute = (frames.double() - found.centroids_KD[labels]).square().sum()
    assert found.inertia == pytest.approx(float(brute), rel=1e-9)


@pytest.fixture
def poor_start(monkeypatch):
    """A start that leaves iterations something to do."""
    monkeypatch.setattr(kmeans, "STARTS", 1)
    monkeypatch.setattr(kmeans, "START_ITERATIONS", 1)


def test_an_iteration_is_lloyds(poor_start):
    frames = blobs(400, 6, 40)
    states = []
    fit_kmeans(frames, torch.arange(400), clusters=9, seed=2, iterations=3, on_iteration=states.append)
    for before, after in itertools.pairwise(states):
        labels, distances = nearest_centroids(frames, before.centroids_KD)
        means = torch.stack([frames[labels == k].double().mean(0) for k in range(9)])
        torch.testing.assert_close(after.centroids_KD, means, rtol=1e-9, atol=1e-9)
        assert after.inertias[-1] == pytest.approx(float(distances.sum()), rel=1e-9)
    assert [state.iteration for state in states] == [0, 1, 2, 3]
    assert states[-1].inertias == sorted(states[-1].inertias, reverse=True)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("spread", ["alternating", "blocks", "one has none"])
def test_ranks_find_the_centroids_of_one(ranks, spread):
    frames, ids = blobs(1000, 10, 30), torch.arange(1000) * 7 + 3
    owner_N = {
        "alternating": torch.arange(1000) % ranks,
        "blocks": torch.arange(1000) * ranks // 1000,
        "one has none": torch.zeros(1000, dtype=torch.int64),
    }[spread]
    settings = {"clusters": 25, "seed": 5}
    one = fit_kmeans(frames, ids, **settings)
    for several in fit_on(ranks, frames, ids, owner_N=owner_N, **settings):
        torch.testing.assert_close(several.centroids_KD, one.centroids_KD, rtol=1e-12, atol=1e-12)
        assert several.counts_K.tolist() == one.counts_K.tolist()
        assert (several.frames, several.iterations) == (1000, one.iterations)
        assert several.inertia == pytest.approx(one.inertia, rel=1e-12)


def test_the_order_of_the_frames_changes_nothing_and_the_seed_does():
    frames, ids = blobs(600, 8, 12), torch.arange(600)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    a, b = (fit_kmeans(frames[at], ids[at], clusters=12, seed=1) for at in (ids, order))
    torch.testing.assert_close(a.centroids_KD, b.centroids_KD, rtol=1e-12, atol=1e-12)
    other = fit_kmeans(frames, ids, clusters=12, seed=2)
    assert not torch.allclose(a.centroids_KD, other.centroids_KD)


def test_a_large_sample_starts_from_a_part_of_it(monkeypatch):
    monkeypatch.setattr(kmeans, "START_FRAMES_PER_CLUSTER", 10)
    frames = blobs(3000, 8, 20)
    found = fit_kmeans(frames, torch.arange(3000), clusters=20, seed=1)
    theirs = min(ScikitKMeans(20, n_init=1, random_state=seed).fit(frames.numpy()).inertia_ for seed in range(3))
    assert found.inertia <= 1.05 * theirs


@pytest.mark.parametrize("after", [0, 1, 4])
def test_going_on_from_any_state_ends_as_if_it_had_never_stopped(after, poor_start):
    frames, ids = blobs(500, 6, 40), torch.arange(500)
    settings = {"clusters": 15, "seed": 3, "iterations": 9, "tolerance": 0.0}
    states, later = [], []
    whole = fit_kmeans(frames, ids, on_iteration=states.append, **settings)
    again = fit_kmeans(frames, ids, state=states[after], on_iteration=later.append, **settings)
    assert torch.equal(again.centroids_KD, whole.centroids_KD) and again.inertia == whole.inertia
    assert [state.iteration for state in later] == [state.iteration for state in states[after + 1 :]]


def test_empty_clusters_take_the_frames_that_are_worst_off():
    frames = torch.cat([torch.zeros(50, 2), torch.tensor([[5.0, 0.0], [0.0, 4.0]])])
    frames[:50] += 0.01 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    far = torch.full((2, 2), 1e3).double()
    state = kmeans.KMeansState(torch.cat([torch.zeros(1, 2).double(), far]))
    states = []
    found = fit_kmeans(frames, torch.arange(52), clusters=3, seed=1, state=state, on_iteration=states.append)
    assert torch.equal(states[0].centroids_KD[1:], torch.tensor([[5.0, 0.0], [0.0, 4.0]]).double())
    assert sorted(found.counts_K.tolist()) == [1, 1, 50]


def test_as_many_clusters_as_distinct_frames_leave_no_distance():
    frames = torch.arange(8.0).repeat(5)[:, None]
    found = fit_kmeans(frames, torch.arange(40), clusters=8, seed=1)
    assert found.inertia == 0 and sorted(found.centroids_KD[:, 0].tolist()) == list(range(8))


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (torch.zeros(3, 2), "3 frames cannot make 4 clusters"),
        (torch.arange(3.0).repeat(4)[:, None], "only 3 distinct values"),
        (torch.full((9, 2), float("nan")), "infinities or NaN"),
    ],
)
def test_frames_that_cannot_be_clustered_are_refused(frames, said):
    with pytest.raises(ValueError, match=said):
        fit_kmeans(frames, torch.arange(len(frames)), clusters=4, seed=1)
