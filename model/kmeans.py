"""K-means over frames that lie on several ranks: the same centroids on one rank and on many, to the last rounding.

Lloyd's iteration from a greedy k-means++ start (Arthur and Vassilvitskii 2007, https://dl.acm.org/doi/10.5555/1283383.1283494;
of several candidates for the next centroid the best is kept). What usually makes it depend on ranks does not here:
- Sums are integers. Frames and distances are scaled by a power of two and rounded to int64, of which every order of
  addition gives the same sum, whether ranks or a GPU's atomics add. Bits are chosen so that no sum can overflow.
- Random choices are races: frame i gets the time -log(u_i) / d_i^2, u_i a function of (seed, step, id of the frame),
  and the earliest win. That draws in proportion to d_i^2 without anybody knowing the sum or the order of the frames.
- Ties and empty clusters go by distance, then by id.

Distances are |x|^2 - 2 x m + |m|^2 in float64, in chunks: in float32 the difference of large numbers would call another
centroid the nearest one. Nothing of size N x K x D, or N x K, is ever held.
Shape letters: N frames on this rank, K clusters, D width, C candidates.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .keyed_random import keyed_uniform

CHUNK_ELEMENTS = 1 << 22  # float64 values in a chunk of distances or of frames: 32 MB
# The best of a few starts, each carried on for some iterations: one alone ends up to 5 % above the best of ten on small
# samples. They look at a random part of the frames, and so cost less than the iterations over all of them.
STARTS, START_ITERATIONS, START_FRAMES_PER_CLUSTER = 4, 10, 200
ROUNDING = 1e-12  # of |x|^2 + |m|^2, what their difference may be off by
START_SAMPLE, CENTROID = 0, 1  # purposes of random numbers; the last one counts on, through centroids and starts


class Ranks(Protocol):
    """What k-means needs of the other ranks; all call the same methods in the same order."""

    def sum_integers(self, values: Tensor) -> Tensor: ...
    def gather(self, value: Any) -> list[Any]: ...


class Alone:
    """One rank of one."""

    def sum_integers(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value]


@dataclass
class KMeansState:
    """Where a fit stands after `iteration` iterations: equal on all ranks, and all that is needed to go on.

    `inertias` has the sum of squared distances that each iteration found, to the centroids it began with.
    """

    centroids_KD: Tensor  # float64, on the CPU
    iteration: int = 0
    inertias: list[float] = field(default_factory=list)
    converged: bool = False


class KMeans(NamedTuple):
    """A finished fit. `inertia` is the sum of squared distances of all frames to their centroids."""

    centroids_KD: Tensor
    inertia: float
    counts_K: Tensor
    frames: int
    iterations: int


def nearest_centroids(frames_ND: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels_N (int64; the lowest of equally near ones) and squared distances_N in float64."""
    labels, distances = [], []
    for chunk_ND in _chunks(frames_ND, max(centroids_KD.shape)):
        squared_NK = squared_distances(chunk_ND, centroids_KD)
        nearest = squared_NK.min(dim=1)
        labels.append(nearest.indices)
        distances.append(nearest.values)
    if not labels:
        return frames_ND.new_zeros(0, dtype=torch.int64), frames_ND.new_zeros(0, dtype=torch.float64)
    return torch.cat(labels), torch.cat(distances)


def squared_distances(frames_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """Return squared_NK in float64."""
    x_ND, m_KD = frames_ND.double(), centroids_KD.double()
    product_NK = x_ND @ m_KD.T
    return (x_ND.square().sum(1, keepdim=True) - 2 * product_NK + m_KD.square().sum(1)).clamp_min_(0.0)


def fit_kmeans(
    frames_ND: Tensor,
    ids_N: Tensor,
    *,
    clusters: int,
    seed: int,
    iterations: int = 100,
    tolerance: float = 1e-4,
    ranks: Ranks | None = None,
    state: KMeansState | None = None,
    on_iteration: Callable[[KMeansState], None] = lambda state: None,
) -> KMeans:
    """Fit `clusters` centroids to the frames of all ranks. Call it on every rank, with each frame on one of them.

    ids_N are int64, unique over all ranks and the same however the frames are spread: random choices hang on them.
    Ends after `iterations`, or when the inertia falls by less than `tolerance` of itself. `on_iteration` is called
    after the start and after each iteration with a state to go on from; `state` is such a one. Raises ValueError where
    there are fewer distinct frames than clusters.
    """
    data = _Data(frames_ND, ids_N, ranks or Alone())
    if data.total < clusters:
        raise ValueError(f"{data.total} frames cannot make {clusters} clusters; sample more frames or lower clusters")
    if state is None:
        state = KMeansState(_start(data, clusters=clusters, seed=seed))
        on_iteration(state)
    while state.iteration < iterations and not state.converged:
        state = _iterate(data, state, tolerance=tolerance)
        on_iteration(state)
    labels_N, distances_N = nearest_centroids(frames_ND, state.centroids_KD.to(frames_ND.device))
    inertia, counts_K = data.sum_distances(distances_N), data.count(labels_N, clusters)
    return KMeans(state.centroids_KD, inertia, counts_K, data.total, state.iteration)


class _Data:
    """This rank's frames, and sums over those of all ranks in integers that count 2 ** -bits."""

    def __init__(self, frames_ND: Tensor, ids_N: Tensor, ranks: Ranks):
        self.frames_ND, self.ids_N, self.ranks = frames_ND, ids_N, ranks
        self.total = int(ranks.sum_integers(torch.tensor([len(frames_ND)]))[0])
        extremes = [abs(float(value)) for value in frames_ND.aminmax()] if len(frames_ND) else [0.0]
        everyones = [value for values in ranks.gather(extremes) for value in values]
        largest = max(everyones)
        if not all(map(math.isfinite, everyones)):
            raise ValueError("frames hold infinities or NaN; the encoder that made them has diverged")
        self.frame_bits = _bits(self.total, largest)
        self.distance_bits = _bits(self.total, frames_ND.shape[1] * (2 * largest) ** 2)

    def sum_distances(self, distances_N: Tensor) -> float:
        return self.sum_distance_columns(distances_N[:, None])[0]

    def sum_distance_columns(self, distances_NC: Tensor) -> list[float]:
        """Return the sum of each column over all ranks."""
        integers_C = (distances_NC * 2.0**self.distance_bits).round().long().sum(0)
        return (self.ranks.sum_integers(integers_C.cpu()).double() * 2.0**-self.distance_bits).tolist()

    def count(self, labels_N: Tensor, clusters: int) -> Tensor:
        return self.ranks.sum_integers(torch.bincount(labels_N, minlength=clusters).cpu())

    def sum_frames(self, labels_N: Tensor, clusters: int) -> Tensor:
        """Return sums_KD in float64, on the CPU: the sum of each cluster's frames over all ranks."""
        D = self.frames_ND.shape[1]
        sums_KD = torch.zeros(clusters, D, dtype=torch.int64, device=self.frames_ND.device)
        for chunk_ND, chunk_N in zip(_chunks(self.frames_ND, D), _chunks(labels_N, D)):
            sums_KD.index_add_(0, chunk_N, (chunk_ND.double() * 2.0**self.frame_bits).round().long())
        return self.ranks.sum_integers(sums_KD.cpu()).double() * 2.0**-self.frame_bits

    def first(self, order_N: Tensor, count: int) -> list[tuple[float, int, Tensor]]:
        """Return (order, id, frame_D) of the `count` frames of all ranks whose finite `order` comes first."""
        count = min(count, len(order_N))
        # One more than wanted would not settle ties at the edge; in float64 they are as good as none, but for repeats
        # of one frame, which are all the same to the centroids.
        best = order_N.topk(count, largest=False)
        mine = [
            (order, int(self.ids_N[at]), self.frames_ND[at].cpu())
            for order, at in zip(best.values.tolist(), best.indices.tolist())
            if math.isfinite(order)
        ]
        everyones = [entry for entries in self.ranks.gather(mine) for entry in entries]
        return sorted(everyones, key=lambda entry: entry[:2])


def _bits(count: int, largest: float) -> int:
    """Return how many binary digits below 1 fit beside the sum of `count` numbers up to `largest` in an int64."""
    return 61 - math.ceil(math.log2(max(count, 1) * max(largest, 1e-30)))


def _start(data: _Data, *, clusters: int, seed: int) -> Tensor:
    """Return centroids_KD to begin with: of several starts, the one with the least inertia after some iterations."""
    wanted = START_FRAMES_PER_CLUSTER * clusters
    if data.total > wanted:
        drawn_N = keyed_uniform(data.ids_N, seed=seed, purpose=START_SAMPLE) < wanted / data.total
        data = _Data(data.frames_ND[drawn_N], data.ids_N[drawn_N], data.ranks)
    states = []
    for start in range(STARTS):
        purpose = CENTROID + start * clusters
        state = KMeansState(_plus_plus(data, clusters=clusters, seed=seed, purpose=purpose))
        while state.iteration < START_ITERATIONS and not state.converged:
            state = _iterate(data, state, tolerance=1e-3)
        states.append(state)
    return min(states, key=lambda state: state.inertias[-1]).centroids_KD


def _plus_plus(data: _Data, *, clusters: int, seed: int, purpose: int) -> Tensor:
    """Return centroids_KD of greedy k-means++; random numbers are those of `purpose` and the clusters - 1 after it."""
    C = 2 + int(math.log(clusters))  # scikit-learn's number of candidates
    time_N = keyed_uniform(data.ids_N, seed=seed, purpose=purpose)
    (_, _, first_D), *_ = data.first(time_N, 1)
    centroids = [first_D.double()]
    closest_N = _distances_to(data.frames_ND, centroids)[:, 0]
    while len(centroids) < clusters:
        time_N = -keyed_uniform(data.ids_N, seed=seed, purpose=purpose + len(centroids)).log() / closest_N
        candidates = [frame_D.double() for _, _, frame_D in data.first(time_N, C)[:C]]
        if not candidates:
            raise ValueError(
                f"the frames hold only {len(centroids)} distinct values, too few for {clusters} clusters; sample more "
                "frames or lower clusters"
            )
        closer_NC = torch.minimum(closest_N[:, None], _distances_to(data.frames_ND, candidates))
        sums = data.sum_distance_columns(closer_NC)
        best = sums.index(min(sums))
        closest_N = closer_NC[:, best]
        centroids.append(candidates[best])
    return torch.stack(centroids)


def _distances_to(frames_ND: Tensor, centroids: list[Tensor]) -> Tensor:
    """Return squared_NC, exactly 0 at the centroid's own frame: what rounding leaves there would be drawn again."""
    centroids_CD = torch.stack(centroids).to(frames_ND.device)
    columns = [frames_ND.new_zeros(0, len(centroids), dtype=torch.float64)]
    for chunk_ND in _chunks(frames_ND, len(centroids)):
        squared_NC = squared_distances(chunk_ND, centroids_CD)
        # Of sums this large, float64 keeps no more: a matrix product for all candidates takes a tenth of the time of
        # exact differences.
        scale_NC = chunk_ND.double().square().sum(1, keepdim=True) + centroids_CD.square().sum(1)
        columns.append(torch.where(squared_NC <= ROUNDING * scale_NC, 0.0, squared_NC))
    return torch.cat(columns)


def _iterate(data: _Data, state: KMeansState, *, tolerance: float) -> KMeansState:
    """One iteration of Lloyd's: assign, sum over ranks, divide."""
    K = len(state.centroids_KD)
    labels_N, distances_N = nearest_centroids(data.frames_ND, state.centroids_KD.to(data.frames_ND.device))
    inertia, counts_K = data.sum_distances(distances_N), data.count(labels_N, K)
    centroids_KD = data.sum_frames(labels_N, K) / counts_K.clamp_min(1)[:, None]
    empty = (counts_K == 0).nonzero()[:, 0].tolist()
    if empty:
        # The frames that are worst off become centroids, as in scikit-learn: a cluster that nothing is near to stays
        # empty for ever.
        farthest = data.first(-distances_N, len(empty))
        for k, (_, _, frame_D) in zip(empty, farthest):
            centroids_KD[k] = frame_D.double()
    before = state.inertias[-1] if state.inertias else math.inf
    converged = not empty and before - inertia <= tolerance * inertia
    return KMeansState(centroids_KD, state.iteration + 1, [*state.inertias, inertia], converged)


def _chunks(values_N: Tensor, width: int) -> Iterator[Tensor]:
    """Cut along N so that a chunk and its float64 copy times `width` stay within CHUNK_ELEMENTS."""
    width = max([width, *values_N.shape[1:]])
    if len(values_N):
        yield from values_N.split(max(1, CHUNK_ELEMENTS // width))
