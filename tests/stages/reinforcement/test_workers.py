"""Who is asked for what with which weights, and what happens where answers are wrong or do not come. These workers are
no processes; real ones are in test_worker_process.py."""

import threading
from contextlib import closing, contextmanager
from itertools import islice

import pytest
import torch
from speaking_toy import SpeakingToy, speaking_config

from seedling.model.decoding import Hypothesis
from seedling.stages.reinforcement.worker_process import Made, WorkerLost
from seedling.stages.reinforcement.workers import Workers
from seedling.stages.runtime.feed import feed
from seedling.stages.runtime.world import World


class FakeWorker:
    """Answers as `answer(micro_batch, weights)` does."""

    pid = 1

    def __init__(self, answer):
        self.answer, self.killed, self.closed = answer, False, False

    def make(self, micro_batch, weights):
        return self.answer(micro_batch, weights)

    def kill(self):
        self.killed = True

    def close(self):
        self.closed = True


def says(micro_batch, version):
    """An answer that shows which micro-batch it is to."""
    return Made([[Hypothesis([micro_batch.index, row])] for _, row in micro_batch.utterances], version, 0.5)


class Generating:
    """A stage and its workers outside the trainer, and all that they were asked for."""

    def __init__(self, tmp_path, *, answer=None, rank=0, ranks=1, **generation):
        self.cfg = speaking_config(tmp_path, generation={"workers": 2, **generation})
        self.stage = SpeakingToy()
        self.model = self.stage.build(self.cfg, {})
        self.answer = answer or (lambda micro_batch, weights: says(micro_batch, weights.version))
        self.world = World(rank, ranks, torch.device("cpu"))
        self.asked, self.workers, self.entered = [], [], []
        self.source = Workers(self.stage, self.cfg, {})
        self.source.start = self.start

    def start(self, recipe):
        def answer(micro_batch, weights):
            self.asked.append((micro_batch.index, weights.version))
            return self.answer(micro_batch, weights)

        self.workers.append(FakeWorker(answer))
        return self.workers[-1]

    @contextmanager
    def weights(self):
        self.entered.append(self.drawn)
        yield self.model

    def steps(self):
        self.drawn = 0
        for fed in feed(self.stage.batches(self.cfg, "train"), world=self.world):
            self.drawn += 1
            yield fed

    def prepared(self, *, step=0, most=8):
        return closing(self.source.prepared(islice(self.steps(), most), weights=self.weights, step=step))


@pytest.mark.parametrize(
    ("every", "first", "versions"),
    [
        (1, 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, 0, [0, 0, 0, 3, 3, 3, 6, 6]),
        (3, 4, [4, 4, 6, 6, 6, 9, 9, 9]),
        (3, 6, [6, 6, 6, 9, 9, 9, 12, 12]),
        (100, 5, [5] * 8),
    ],
)
def test_weights_are_delivered_at_multiples_and_where_the_run_stands(tmp_path, every, first, versions):
    generating = Generating(tmp_path, every=every)
    got, untouched = [], feed(generating.stage.batches(generating.cfg, "train"), world=generating.world)
    with generating.prepared(step=first) as steps:
        for step, (fed, same) in enumerate(zip(steps, untouched), start=first):
            assert fed.planned == same.planned and [b.index for b in fed.batches] == [b.index for b in same.batches]
            for batch in fed.batches:
                generated = generating.source.of(generating.model, batch)
                assert [nbest[0].ids[0] for nbest in generated.hypotheses] == [batch.index] * len(batch)
                assert generated.age == step - generated.version and generated.seconds == 0.5
            got.append(generated.version)
    assert got == versions
    assert len(generating.entered) == len(set(versions))
    assert sorted(generating.asked) == [(4 * i + m, version) for i, version in enumerate(versions) for m in range(4)]


def test_steps_are_pulled_no_further_than_to_the_next_delivery(tmp_path):
    generating = Generating(tmp_path, every=3)
    with generating.prepared(step=1, most=7) as steps:
        drawn = [generating.drawn for _ in steps]
    assert drawn == [2, 2, 5, 5, 5, 7, 7]
    assert generating.entered == [2, 5, 7]  # nothing was yielded between the copy of the weights and its first use


def test_each_rank_generates_for_its_own_micro_batches(tmp_path):
    asked = []
    for rank in range(2):
        generating = Generating(tmp_path, rank=rank, ranks=2)
        with generating.prepared(most=3) as steps:
            for fed in steps:
                assert fed.share == fed.planned.share(rank, world_size=2)
                for batch in fed.batches:
                    generating.source.of(generating.model, batch)
        asked.append(sorted(index for index, _ in generating.asked))
    assert asked == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def test_hypotheses_of_other_weights_are_refused_counted_and_made_again(tmp_path, caplog):
    wrong = {5: [4, -1], 6: [2]}  # micro-batch of step 1 -> versions that its first answers carry

    def answer(micro_batch, weights):
        versions = wrong.get(micro_batch.index)
        return says(micro_batch, versions.pop() if versions else weights.version)

    generating = Generating(tmp_path, answer=answer)
    with generating.prepared(most=3) as steps:
        for step, fed in enumerate(steps):
            made = [generating.source.of(generating.model, batch) for batch in fed.batches]
            assert [one.version for one in made] == [step] * 4
    assert generating.source.refused == 3 and generating.source.restarts == 0
    assert [asked for asked in generating.asked if asked[0] == 5] == [(5, 1)] * 3
    assert "hypotheses of micro-batch 5 refused: they are of version -1, 2 steps old, and generation.max" in caplog.text
    assert "hypotheses of micro-batch 5 refused: they are of version 4 instead of 1" in caplog.text


def test_what_is_always_refused_ends_the_run(tmp_path):
    generating = Generating(tmp_path, answer=lambda micro_batch, _: says(micro_batch, 7), max_restarts=2)
    with generating.prepared() as steps:
        batch = next(steps).batches[0]
        with pytest.raises(RuntimeError, match=r"of version 7 instead of 0, after 2 such failures .*max_restarts=2"):
            generating.source.of(generating.model, batch)
    assert generating.asked.count((0, 0)) == 3


def test_the_work_of_a_lost_worker_is_done_again_with_the_same_weights(tmp_path, caplog):
    """It is lost when training has long gone on: all else of that delivery has been made."""
    lost, gone_on = [], threading.Event()

    def answer(micro_batch, weights):
        if micro_batch.index == 10 and not lost:
            assert gone_on.wait(600)
            lost.append(weights)
            raise WorkerLost("ended with exit code -9")
        return says(micro_batch, weights.version)

    generating = Generating(tmp_path, answer=answer, every=3)
    with generating.prepared(most=6) as steps:
        for step, fed in enumerate(steps):
            with torch.no_grad():
                generating.model.head.bias += 1
            for batch in fed.batches:
                if batch.index == 10:
                    gone_on.set()
                assert generating.source.of(generating.model, batch).version == step // 3 * 3
    assert generating.source.restarts == 1 and len(generating.workers) == 3
    assert [asked for asked in generating.asked if asked[0] == 10] == [(10, 0)] * 2
    assert "ended with exit code -9 over micro-batch 10" in caplog.text


def test_workers_that_die_again_and_again_end_the_run_naming_the_exit_code(tmp_path):
    def answer(micro_batch, weights):
        raise WorkerLost("ended with exit code -9")

    generating = Generating(tmp_path, answer=answer, workers=1, max_restarts=3)
    with generating.prepared() as steps:
        batch = next(steps).batches[0]
        message = "generation worker 0 ended with exit code -9 over micro-batch 0, after 3 such failures"
        with pytest.raises(RuntimeError, match=message):
            generating.source.of(generating.model, batch)
        assert generating.asked.count((0, 0)) == 4


def test_an_error_of_the_stage_is_raised_where_its_hypotheses_are_wanted(tmp_path):
    def answer(micro_batch, weights):
        if micro_batch.index == 2:
            raise ValueError("u0007 cannot be said")
        return says(micro_batch, weights.version)

    generating = Generating(tmp_path, answer=answer)
    with generating.prepared() as steps:
        batches = next(steps).batches
        for batch in (batches[0], batches[1], batches[3]):
            generating.source.of(generating.model, batch)
        with pytest.raises(ValueError, match="u0007 cannot be said"):
            generating.source.of(generating.model, batches[2])
    assert generating.source.restarts == 0


def test_a_replay_gets_the_same_hypotheses_and_a_batch_of_no_step_is_generated_here(tmp_path):
    generating = Generating(tmp_path)
    data = generating.stage.batches(generating.cfg, "train")
    dry = data.dataset[data.plan.summary().largest._replace(index=999)]
    here = generating.source.of(generating.model, dry)
    assert here.hypotheses[0][0].ids and not generating.workers
    with generating.prepared(most=2) as steps:
        batch = next(steps).batches[1]
        once = generating.source.of(generating.model, batch)
        assert generating.source.of(generating.model, batch).hypotheses is once.hypotheses
        next(steps)
        assert generating.source.of(generating.model, batch).hypotheses != once.hypotheses
    assert generating.asked.count((1, 0)) == 1


@pytest.mark.parametrize("early", [True, False])
def test_no_worker_and_no_thread_is_left(tmp_path, early):
    others = set(threading.enumerate())  # of tests before this one, which may end meanwhile

    def ours() -> int:
        return len(set(threading.enumerate()) - others)

    generating = Generating(tmp_path)
    with generating.prepared(most=3) as steps:
        next(steps)
        assert generating.source.pids == [1, 1] and ours() == 2
        if not early:
            list(steps)
    assert all(worker.killed and worker.closed for worker in generating.workers)
    assert ours() == 0 and generating.source.pids == []


def test_closing_does_not_wait_for_hypotheses_nor_start_what_it_kills(tmp_path, caplog):
    killed, busy = threading.Event(), threading.Barrier(3)

    def answer(micro_batch, weights):
        busy.wait(600)
        assert killed.wait(600)
        raise WorkerLost("ended with exit code -9")

    generating = Generating(tmp_path, answer=answer)
    with generating.prepared() as steps:
        next(steps)
        busy.wait(600)
        for worker in generating.workers:
            worker.kill = killed.set
    assert len(generating.workers) == 2 and generating.source.restarts == 0
    assert "exit code" not in caplog.text


def test_workers_without_work_are_named(tmp_path, caplog):
    with Generating(tmp_path, workers=5).prepared() as steps:
        next(steps)
    assert "generation.workers is 5, and between two deliveries of weights there are 4 micro-batches" in caplog.text
    caplog.clear()
    with Generating(tmp_path, workers=5, every=2).prepared() as steps:
        next(steps)
    assert not caplog.text
