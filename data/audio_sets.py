"""Sets of audio as a stage's config names them, turned into planned batches for training and for validation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .augment import AugmentConfig
from .batches import PlannedBatches
from .concat import ConcatConfig, joined
from .contexts.draw import DrawnContexts, WithContexts
from .frame_labels import FrameLabels
from .index import Corpus, PathLike
from .loader import AudioDataset
from .plan import Plan, PlanConfig, PlanLimits, UtteranceIndex
from .remote import RemoteConfig


@dataclass
class AudioDataConfig:
    """Folders of shards (`seedling prepare`), here or on a server, and the limits of their micro-batches."""

    train: list[str] = field(default_factory=list)
    valid: dict[str, str] = field(default_factory=dict)  # name, as metrics show it -> folder
    limits: PlanLimits = field(default_factory=PlanLimits)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    concat: ConcatConfig = field(default_factory=ConcatConfig)  # of the training set
    remote: RemoteConfig = field(default_factory=RemoteConfig)  # of folders on http(s):// and s3://

    def training(
        self,
        *,
        micro_batch_seconds: float,
        micro_batches: int,
        seed: int,
        sample_rate: int,
        require_text: bool,
        labels: FrameLabels | None = None,
        contexts: DrawnContexts | None = None,
    ) -> PlannedBatches:
        """Return the shuffled, augmented training set in steps of `micro_batches`."""
        if not self.train:
            raise ValueError("data.train is empty; name folders that `seedling prepare` wrote, as data.train=[DIR]")
        limits = PlanConfig(**asdict(self.limits), max_seconds=micro_batch_seconds, stretch=self.augment.max_stretch)
        corpus = joined(
            Corpus.open(self.train, remote=self.remote),
            self.concat,
            plan=limits,
            seed=seed,
            require_text=require_text,
            beside=[("frame labels", labels), ("contexts", contexts)],
        )
        dataset = AudioDataset(
            corpus,
            augment=self.augment,
            seed=seed,
            sample_rate=sample_rate,
            require_text=require_text,
            labels=labels,
            contexts=contexts,
            gap_seconds=self.concat.gap_seconds,
            remote=self.remote,
        )
        planned = Plan(_planned(corpus, contexts), limits, seed=seed, micro_batches_per_step=micro_batches)
        return PlannedBatches(planned, dataset)

    def validation(
        self,
        *,
        micro_batch_seconds: float,
        micro_batches: int,
        sample_rate: int,
        require_text: bool,
        labels: FrameLabels | None = None,
        contexts: dict[str, DrawnContexts] | None = None,
    ) -> dict[str, PlannedBatches]:
        """Return each validation set in a fixed order, without augmentation; `contexts` by the name of the set."""
        return {
            name: heldout(
                folder,
                self.limits,
                micro_batch_seconds=micro_batch_seconds,
                micro_batches=micro_batches,
                sample_rate=sample_rate,
                require_text=require_text,
                labels=labels,
                contexts=(contexts or {}).get(name),
                remote=self.remote,
            )
            for name, folder in self.valid.items()
        }


def heldout(
    folders: PathLike | list[str],
    limits: PlanLimits,
    *,
    micro_batch_seconds: float,
    micro_batches: int,
    sample_rate: int,
    require_text: bool = True,
    labels: FrameLabels | None = None,
    contexts: DrawnContexts | None = None,
    concat: ConcatConfig | None = None,
    remote: RemoteConfig | None = None,
) -> PlannedBatches:
    """Return one pass over shards in a fixed order, without augmentation; with `concat` of joined utterances."""
    concat = concat or ConcatConfig()
    plain = PlanConfig(**asdict(limits), max_seconds=micro_batch_seconds, shuffle=False)
    beside = [("frame labels", labels), ("contexts", contexts)]
    opened = Corpus.open(folders, remote=remote)
    corpus = joined(opened, concat, plan=plain, seed=0, require_text=require_text, beside=beside)
    dataset = AudioDataset(
        corpus,
        sample_rate=sample_rate,
        require_text=require_text,
        labels=labels,
        contexts=contexts,
        gap_seconds=concat.gap_seconds,
    )
    planned = Plan(_planned(corpus, contexts), plain, seed=0, micro_batches_per_step=micro_batches)
    return PlannedBatches(planned, dataset)


def _planned(corpus: UtteranceIndex, contexts: DrawnContexts | None) -> UtteranceIndex:
    return WithContexts(corpus, contexts) if contexts is not None else corpus
