"""Ranks that are threads of one process, for what several processes do together.

Models are made before the threads, which share the generator that draws weights.
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor


class Together:
    """Meets at a barrier, which breaks where a rank does not come."""

    def __init__(self, size):
        self.size, self.meeting, self.values = size, threading.Barrier(size, timeout=600), [None] * size

    def of(self, rank):
        one = copy.copy(self)
        one.rank = rank
        return one

    def gather(self, value):
        self.values[self.rank] = value
        self.meeting.wait()
        found = copy.deepcopy(self.values)
        self.meeting.wait()
        return found

    def sum_floats(self, values):
        return sum(self.gather(values))

    def barrier(self):
        self.meeting.wait()


def on_ranks(size, run):
    """Return [run(ranks) of each rank]; a rank that waits for nobody is an error."""
    together = Together(size)
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: run(together.of(rank)), range(size)))
