"""Packing: utterances sorted by length become micro-batches, each a slice of the sorted order.

The price of a micro-batch is what it costs when padded: its most expensive utterance times its number of utterances,
for audio and for text alike. Shape letters: U utterances in packing order, N micro-batches, each a (start, stop) row.
"""

from __future__ import annotations

import heapq

import numpy as np


def pack(cost_U: np.ndarray, tokens_U: np.ndarray, *, max_cost: float, max_tokens: int) -> np.ndarray:
    """Cut the order greedily into slices [N, 2] within both limits (`max_tokens` 0: no such limit).

    Every utterance must fit alone; the caller has refused the others.
    """
    max_cost *= 1 + 1e-9  # 3 x 0.1 s must fit into 0.3 s
    token_limit = max_tokens or np.iinfo(np.int64).max
    starts = []
    longest, most, count = 0.0, 0, 0
    # Plain numbers in a plain loop: 0.3 s per million utterances, and nothing to get wrong at a block's edge.
    for position, (cost, tokens) in enumerate(zip(cost_U.tolist(), tokens_U.tolist())):
        longest = cost if cost > longest else longest
        most = tokens if tokens > most else most
        count += 1
        if count == 1 or longest * count > max_cost or most * count > token_limit:
            starts.append(position)
            longest, most, count = cost, tokens, 1
    stops = [*starts[1:], len(cost_U)]
    return np.array([starts, stops if starts else []], dtype=np.int64).T


def slice_max(values_U: np.ndarray, slices_N2: np.ndarray) -> np.ndarray:
    """Return the maximum of each slice [N]; 0 for empty ones. The slices must not overlap, in whatever order."""
    maxima_N = np.zeros(len(slices_N2), dtype=values_U.dtype)
    filled = np.flatnonzero(slices_N2[:, 1] > slices_N2[:, 0])
    if len(filled):
        filled = filled[np.argsort(slices_N2[filled, 0])]
        # reduceat reduces [start, next given index): giving the stops as well, every second result is a slice's own.
        edges = slices_N2[filled].ravel()
        if edges[-1] == len(values_U):
            edges = edges[:-1]
        maxima_N[filled] = np.maximum.reduceat(values_U, edges)[::2]
    return maxima_N


def into_whole_steps(slices_N2: np.ndarray, cost_U: np.ndarray, *, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Make the number of micro-batches a multiple of `step` by halving the dearest of the last ones.

    Returns (untouched head, new tail). The tail starts as the last full step and the remainder, so the last two steps
    share the work of both; it reaches back further only if it has too few utterances to split. Should even the whole
    window have too few, empty micro-batches fill up the last step: no utterance is repeated, dropped or over a limit.
    """
    missing = -len(slices_N2) % step
    if not missing:
        return slices_N2, slices_N2[:0]
    sizes_N = slices_N2[:, 1] - slices_N2[:, 0]
    tail = min(len(slices_N2), step + len(slices_N2) % step)
    while tail < len(slices_N2) and sizes_N[-tail:].sum() < tail + missing:
        tail = min(len(slices_N2), tail + step)
    head, tail_N2 = slices_N2[: len(slices_N2) - tail], slices_N2[len(slices_N2) - tail :]
    done: list[tuple[int, int]] = []
    heap = [(-_price(cost_U, start, stop), start, stop) for start, stop in tail_N2.tolist()]
    heapq.heapify(heap)
    while heap and missing:
        _, start, stop = heapq.heappop(heap)
        if stop - start < 2:
            done.append((start, stop))
            continue
        middle = (start + stop) // 2
        heapq.heappush(heap, (-_price(cost_U, start, middle), start, middle))
        heapq.heappush(heap, (-_price(cost_U, middle, stop), middle, stop))
        missing -= 1
    done += [(start, stop) for _, start, stop in heap]
    return head, np.array(sorted(done) + [(0, 0)] * missing, dtype=np.int64)


def _price(cost_U: np.ndarray, start: int, stop: int) -> float:
    return float(cost_U[start:stop].max()) * (stop - start)
