"""Work over shards in parallel processes, with one progress bar, and with no process left behind.

Processes are spawned, not forked (forking beside torch's threads can deadlock), so `work` must be importable. A worker
ends when its parent does, however that dies: one that lived on would go on writing beside the run that resumes.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")

REFRESH_S = 0.5
_done = None  # shared counter of finished units: in a worker process, what the parent's bar shows


def advance(count: int = 1) -> None:
    """Called by the work function: so many more units of the bar are finished."""
    if _done is not None:
        with _done.get_lock():
            _done.value += count


def over_shards(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, jobs: int, label: str, total: int, unit: str
) -> Iterator[tuple[int, Result]]:
    """Yield (task number, result) as tasks finish, in up to `jobs` processes; 1 works in this one.

    `total` units make the bar full; `work` reports them with `advance`. An exception of `work` is raised here.
    """
    if jobs < 1:
        raise ValueError(f"jobs ({jobs}) must be at least 1")
    with tqdm(total=total, desc=label, unit=f" {unit}", disable=None, smoothing=0.1) as bar:
        run = _in_this_process if jobs == 1 or len(tasks) == 1 else _in_processes
        yield from run(work, tasks, bar=bar, jobs=min(jobs, len(tasks)))


def _in_this_process(work, tasks, *, bar: tqdm, jobs: int):
    global _done
    _done = _BarCounter(bar)
    try:
        for number, task in enumerate(tasks):
            yield number, work(task)
    finally:
        _done = None


class _BarCounter:
    """Looks like a shared counter and moves the bar at once."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def get_lock(self):
        return threading.Lock()

    @property
    def value(self) -> int:
        return self.bar.n

    @value.setter
    def value(self, units: int) -> None:
        self.bar.update(units - self.bar.n)


def _in_processes(work, tasks, *, bar: tqdm, jobs: int):
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(done,)) as pool:
        numbers = {pool.submit(work, task): number for number, task in enumerate(tasks)}
        pending = set(numbers)
        try:
            while pending:
                finished, pending = wait(pending, timeout=REFRESH_S, return_when=FIRST_COMPLETED)
                bar.update(done.value - bar.n)
                for future in sorted(finished, key=numbers.__getitem__):
                    yield numbers[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError("a worker process was killed (out of memory?); try again with fewer jobs") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(done) -> None:
    global _done
    _done = done
    end_with_parent()


def end_with_parent() -> None:
    """Called by a process that multiprocessing started: let it end when its parent does, whatever it is doing."""
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only started in worker processes"
    parent.join()
    os._exit(1)
