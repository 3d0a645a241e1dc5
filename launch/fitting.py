"""What to change so that a run fits into a GPU. Whatever is named has been planned as it would run, and fits.

Tried in this order: the config as it is, another ZeRO stage, micro-batches halved again and again, recomputed layers
with these, more ranks. A step keeps its size but where the ranks could not share its micro-batches; then
`train.global_batch_seconds` is raised until they can. Micro-batches are never so small that an utterance of training or
validation which had a place would be refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from ..stages.runtime.gpus import GPU
from ..stages.runtime.stage import validation_sets
from .plan import RunPlan, allowed_stages, plan_run, setting

MOST_RANKS = 2**16
RECOMPUTE = "encoder.activation_checkpointing"

Changes = dict[str, Any]  # dotted name of a setting -> value


class Fit(NamedTuple):
    """A run that fits: what to set, and on how many ranks."""

    changes: Changes
    ranks: int

    def __str__(self) -> str:
        return " ".join(f"{name}={_shown(value)}" for name, value in self.changes.items())


class Fitting:
    """A run, a GPU, and all that was planned to bring the one into the other."""

    def __init__(self, run: RunPlan, gpu: GPU):
        self.run, self.gpu = run, gpu
        self.planned: dict[str, RunPlan | ValueError] = {"": run}

    def nearest(self, ranks: int) -> Fit | None:
        """Return the first change with which the run fits on so many ranks, or on more; None where none is known.

        ValueError where a step that so many ranks can share is more than the corpus has utterances for.
        """
        if isinstance(refusal := self._plan(self._shared({}, ranks)), ValueError):
            raise refusal
        for changes in self._candidates(ranks):
            if fit := self._with_some_stage(changes, ranks):
                return fit
        while (ranks := 2 * ranks) <= MOST_RANKS:
            if any(self._fits(self.run, zero_stage, ranks) for zero_stage in allowed_stages(self.run)):
                return self._with_some_stage({}, ranks)
        return None

    def _candidates(self, ranks: int) -> Iterator[Changes]:
        """Yield no change, then smaller micro-batches, without and with recomputed layers."""
        yield {}
        if not self._fits_without_activations(ranks):
            return
        recompute: list[Changes] = [{}]
        if getattr(getattr(self.run.cfg, "encoder", None), "activation_checkpointing", None) is False:
            recompute.append({RECOMPUTE: True})
        for more in recompute:
            changes = more
            while isinstance(self._plan(changes), RunPlan):
                if changes:
                    yield changes
                changes = more | self._halved(changes)

    def _fits_without_activations(self, ranks: int) -> bool:
        """Whether smaller micro-batches could be of use."""
        trace = self.run.trace
        nothing = trace._replace(
            saved=0, forward_peak=0, batch=0, segments=[s._replace(peak=0) for s in trace.segments]
        )
        least = self.run._replace(trace=nothing, trace_3=nothing, generation=0)
        return any(self._fits(least, zero_stage, ranks) for zero_stage in allowed_stages(least))

    def _halved(self, changes: Changes) -> Changes:
        """Return micro-batches of half the size, twice as many a step."""
        cfg, name = changed(self.run.cfg, changes), self.run.size_setting
        size, train = value_of(cfg, name), cfg.train
        half = size // 2 if isinstance(size, int) else size / 2
        if name == "train.micro_batch_seconds":
            return {name: half}
        return {name: half, "train.global_batch_seconds": 2 * train.micro_batches * train.micro_batch_seconds}

    def _with_some_stage(self, changes: Changes, ranks: int) -> Fit | None:
        """Return what fits with these changes, the config's own ZeRO stage before others."""
        changes = self._shared(changes, ranks)
        run = self._plan(changes)
        if isinstance(run, ValueError):
            return None
        assert run.train.micro_batches % ranks == 0
        own = run.train.effective_zero_stage
        for zero_stage in sorted(allowed_stages(run), key=lambda stage: (stage != own, stage)):
            fit = Fit(changes | ({} if zero_stage == own else {"train.zero_stage": zero_stage}), ranks)
            if self._fits(run, zero_stage, ranks) and isinstance(self._plan(fit.changes), RunPlan):
                return fit
        return None

    def _shared(self, changes: Changes, ranks: int) -> Changes:
        """Raise the size of a step until the ranks can share its micro-batches."""
        train = changed(self.run.cfg, changes).train
        whole = -(-train.micro_batches // ranks) * ranks
        if whole == train.micro_batches:
            return changes
        return changes | {"train.global_batch_seconds": whole * train.micro_batch_seconds}

    def _fits(self, run: RunPlan, zero_stage: int, ranks: int) -> bool:
        return setting(run, zero_stage=zero_stage, ranks=ranks).fits(self.gpu)

    def _plan(self, changes: Changes) -> RunPlan | ValueError:
        """Return the plan of the run with these changes, or why there is none."""
        name = str(Fit(changes, 1))
        if name not in self.planned:
            try:
                run = plan_run(type(self.run.stage)(), changed(self.run.cfg, changes))
                refused = _refused(run) - self._refused
                self.planned[name] = ValueError(f"{name} refuses {refused} utterances") if refused > 0 else run
            except ValueError as error:
                self.planned[name] = error
        return self.planned[name]

    @cached_property
    def _refused(self) -> int:
        return _refused(self.run)


def _refused(run: RunPlan) -> int:
    """Return how many utterances are outside the limits, in training and validation."""
    epoch, held_out = run.epoch, validation_sets(run.stage, run.cfg).values()
    count = len(epoch.refused) if epoch.sampled_windows else epoch.num_refused
    return count + sum(1 for batches in held_out for _ in batches.plan.refused())


def changed(cfg: Any, changes: Changes) -> Any:
    """Return a config with other values under some dotted names; ValueError where it refuses them."""
    for name, value in changes.items():
        section, _, rest = name.partition(".")
        cfg = replace(cfg, **{section: changed(getattr(cfg, section), {rest: value}) if rest else value})
    return cfg


def value_of(cfg: Any, name: str) -> Any:
    for part in name.split("."):
        cfg = getattr(cfg, part)
    return cfg


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.12g}"
