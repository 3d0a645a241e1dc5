"""cluster_labels: k-means on one layer of a frozen encoder, and the code of every frame of a corpus in sidecar files.

The tokenizer of the next iteration of encoder_pretrain (Seed-ASR, HuBERT). Three parts, each shared by all ranks and
none dependent on their number: frames sampled along the plan, k-means, labels shard by shard. A killed run goes on: the
sample is drawn again (a function of seed and corpus), k-means from its last iteration, labels with the missing shards.
What is done is kept in RUN/checkpoints.
Shape letters: B utterances, T frames of 40 ms, D width, N frames on this rank, K clusters.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.audio_sets import AudioDataConfig, heldout
from ..data.batches import PlannedBatches, make_loader
from ..data.frame_labels import (
    MAX_CODES,
    UtteranceLabels,
    audio_hash,
    count_codes,
    count_unlabelled,
    is_written,
    label_shard_name,
    write_label_index,
    write_label_shard,
)
from ..data.index import Corpus
from ..data.loader import AudioBatch, utterance_key
from ..data.payload import PayloadReader
from ..data.plan import MicroBatch
from ..model.codes import code_use
from ..model.conformer import valid_frames
from ..model.frame_labeler import FrameLabeler, cut_encoder
from ..model.keyed_random import keyed_uniform
from ..model.kmeans import KMeans, KMeansState, fit_kmeans
from ..model.speech_encoder import SpeechEncoder, speech_encoder_facts
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.config import StageConfig
from .runtime.kept_work import KeptWork
from .runtime.train_config import RESUME_MODES, require_choice
from .runtime.world import init_world

SAMPLE = 1 << 32  # purpose of the random numbers that sample frames; k-means counts its own from 0
FRAME_BITS = 20  # of a frame's id: an utterance may have 2^20 frames, 11 hours
KMEANS, LABELS = "kmeans", "labels"
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ClusterLabelsConfig(StageConfig):
    data: AudioDataConfig = field(default_factory=AudioDataConfig)  # labelled: train and every valid set
    layer: int = 0  # counted from 1; 0 takes the one that inputs.probe chose
    clusters: int = 500
    sample_frames: int = 1_000_000  # that k-means is fitted to; 4 bytes x encoder.dim each in memory, over all ranks
    # Of each utterance: more utterances say more than more frames of each, but each costs its whole forward pass.
    sample_share: float = 0.1
    iterations: int = 100
    tolerance: float = 1e-4  # k-means ends when the inertia falls by less than this part of itself; -1: never early
    batch_seconds: float = 120.0
    write_labels: bool = True  # False: only the labeler, for labels on the fly
    num_workers: int = 0  # processes that read audio
    max_bad_fraction: float = 0.01  # of the utterances, that may not be readable
    resume: str = "auto"  # never: delete what an earlier run has kept

    def __post_init__(self):
        require_choice("resume", self.resume, RESUME_MODES)
        if not 2 <= self.clusters <= MAX_CODES:
            raise ValueError(f"clusters is {self.clusters}; a code has two bytes, so choose 2 to {MAX_CODES}")
        if self.layer < 0:
            raise ValueError(f"layer is {self.layer}; layers count from 1, and 0 takes the one that inputs.probe chose")
        if not 0 < self.sample_share <= 1:
            raise ValueError(f"sample_share is {self.sample_share}; it is a part of each utterance, above 0 up to 1")
        if self.sample_frames < self.clusters:
            raise ValueError(f"sample_frames ({self.sample_frames}) must be at least clusters ({self.clusters})")
        if self.data.augment.speed_probability or self.data.augment.noise_probability:
            raise ValueError("data.augment is on, and labels are those of clean audio; leave it out")


class ClusterLabels:
    """Sample frames, fit centroids, label everything."""

    consumes = {"encoder": ArtifactSpec("speech_encoder"), "probe": ArtifactSpec("layer_probe", required=False)}
    produces = "frame_labeler"
    Config = ClusterLabelsConfig

    def run(self, cfg: ClusterLabelsConfig, inputs: dict[str, Artifact], writer: ArtifactWriter) -> None:
        self.cfg, self.world = cfg, init_world()
        if not cfg.data.train:
            raise ValueError("data.train is empty; name folders that `seedling prepare` wrote, as data.train=[DIR]")
        layer = chosen_layer(cfg, inputs)
        whole = SpeechEncoder.from_pretrained(inputs["encoder"].path)
        inputs["encoder"].require(speech_encoder_facts(whole), wanted_by="what was loaded from it")
        encoder = cut_encoder(whole, layer=layer).to(self.world.device).eval()
        what = {"encoder": f"{inputs['encoder'].hash}, layer {layer}", **what_decides_the_centroids(cfg)}
        kept = KeptWork.open(
            Path(cfg.run_dir) / "checkpoints", begun_with=what, anew=cfg.resume == "never", world=self.world
        )
        fitted = self._fit(encoder, kept)
        labeler = FrameLabeler(encoder, fitted.centroids_KD).to(self.world.device)
        counts_K, names = fitted.counts_K, []
        if cfg.write_labels:
            folder = kept.subfolder(labels_folder_name(labeler))
            counts_K, names = self._label(labeler, folder)
            if self.world.is_main:
                hand_over(folder, writer.path / LABELS, names, codes=cfg.clusters, made_by=str(inputs["encoder"].hash))
        if self.world.is_main:
            labeler.save_pretrained(writer.path)
            use = code_use(counts_K[None])
            facts = {"clusters": cfg.clusters, "layer": layer, "encoder_manifest": inputs["encoder"].hash}
            writer.facts |= facts | speech_encoder_facts(encoder)
            writer.metrics |= {
                "inertia": fitted.inertia / fitted.frames,  # squared distance of a frame to its centroid
                "code_perplexity": use.perplexity_N.item(),
                "code_usage": use.usage_N.item(),
                "kmeans_iterations": fitted.iterations,
                "sampled_frames": fitted.frames,
                "labelled_frames": int(counts_K.sum()) if names else 0,
            }

    # ---- k-means

    def _fit(self, encoder: SpeechEncoder, kept: KeptWork) -> KMeans:
        cfg, state = self.cfg, None
        if (found := kept.load(KMEANS)) is not None:
            tensors, facts = found
            state = KMeansState(**tensors, **facts)
            if self.world.is_main:
                print(f"resuming from {kept.folder}: k-means after {state.iteration} iterations", flush=True)
        frames_ND, ids_N = self._sample(encoder)

        def keep(state: KMeansState) -> None:
            if self.world.is_main:
                facts = {name: value for name, value in vars(state).items() if name != "centroids_KD"}
                kept.save(KMEANS, {"centroids_KD": state.centroids_KD}, **facts)
                if state.inertias:
                    print(f"k-means iteration {state.iteration}: inertia {state.inertias[-1]:.6g}", flush=True)

        return fit_kmeans(
            frames_ND,
            ids_N,
            clusters=cfg.clusters,
            seed=cfg.seed,
            iterations=cfg.iterations,
            tolerance=cfg.tolerance,
            ranks=self.world,
            state=state,
            on_iteration=keep,
        )

    @torch.no_grad()
    def _sample(self, encoder: SpeechEncoder) -> tuple[Tensor, Tensor]:
        """Return this rank's sampled frames_ND (float32) and their ids_N, which no other rank has."""
        data = self.cfg.data.training(seed=self.cfg.seed, **self._reading(encoder))
        frames_per_second = speech_encoder_facts(encoder)["encoder_frames_per_second"]
        # A small corpus gives more of each utterance, a large one only the first utterances of its plan.
        every = frames_per_second * data.plan.summary(0).seconds
        share = min(1.0, max(self.cfg.sample_share, self.cfg.sample_frames / every))
        enough_seconds = self.cfg.sample_frames / (share * frames_per_second)
        corpus = data.dataset.corpus
        first_S = np.cumsum([0, *corpus.rows_S])
        frames = [torch.zeros(0, encoder.encoder.cfg.dim, device=self.world.device)]
        ids = [torch.zeros(0, dtype=torch.int64)]
        planned = data.first_seconds(enough_seconds)[self.world.rank :: self.world.size]
        for batch, utterances in self._batches(data, planned):
            h_BTD, lengths_B = encoder(batch.waveforms_BN, batch.lengths_B)
            number_B = torch.tensor([int(first_S[shard]) + row for shard, row in utterances])
            ids_BT = (number_B[:, None] << FRAME_BITS) + torch.arange(h_BTD.shape[1])
            drawn_BT = keyed_uniform(ids_BT, seed=self.cfg.seed, purpose=SAMPLE) < share
            taken_BT = drawn_BT & valid_frames(lengths_B.cpu(), h_BTD.shape[1])[..., 0]
            frames.append(h_BTD[taken_BT.to(h_BTD.device)].float())
            ids.append(ids_BT[taken_BT])
        return torch.cat(frames), torch.cat(ids).to(self.world.device)

    def _batches(
        self, data: PlannedBatches, planned: list[MicroBatch]
    ) -> Iterator[tuple[AudioBatch, list[tuple[int, int]]]]:
        """Yield each batch that has anything usable, on the device, and the (shard, row) of every utterance in it."""
        loader = make_loader(data, planned, num_workers=self.cfg.num_workers)
        for micro_batch, batch in zip(planned, loader):
            if utterances := usable(batch, micro_batch, data.dataset.corpus):
                yield batch.to(self.world.device), utterances

    def _reading(self, encoder: SpeechEncoder) -> dict:
        """How audio is read. Steps of one micro-batch are the same ones, bit for bit, for any number of ranks."""
        return {
            "micro_batch_seconds": self.cfg.batch_seconds,
            "micro_batches": 1,
            "sample_rate": encoder.fbank.cfg.sample_rate,
            "require_text": False,
        }

    # ---- labels

    def _label(self, labeler: FrameLabeler, folder: Path) -> tuple[Tensor, list[str]]:
        """Write the missing label shards, each by one rank; return counts_K over all of them and their names."""
        data = self.cfg.data
        corpus = Corpus.open(list(dict.fromkeys([*data.train, *data.valid.values()])), remote=data.remote)
        names = [label_shard_name(number, path) for number, path in enumerate(corpus.shards)]
        mine = range(self.world.rank, len(names), self.world.size)
        bad = 0
        for number in mine:
            if not is_written(folder, names[number]):
                labels = self._label_shard(labeler, corpus.shards[number])
                write_label_shard(folder, names[number], shard=corpus.shards[number], labels=labels)
            # Counted in what is written, so that a run that goes on judges the shards of the one before as well.
            refused = sum(1 for _ in self._planned(labeler, corpus.shards[number]).plan.refused())
            bad += count_unlabelled(folder, names[number]) - refused
            if self.world.is_main:
                print(f"labelled {names[number]} ({number + 1} of {len(names)})", flush=True)
        bad = sum(self.world.gather(bad))
        if bad > self.cfg.max_bad_fraction * corpus.num_utterances:
            raise ValueError(
                f"{bad} of {corpus.num_utterances} utterances could not be labelled, more than max_bad_fraction="
                f"{self.cfg.max_bad_fraction} (each is named in the log above); repair the data "
                "(`seedling check-data`) or raise the limit"
            )
        counts = count_codes(folder, [names[number] for number in mine], codes=self.cfg.clusters)
        return self.world.sum_integers(torch.from_numpy(counts)), names

    def _planned(self, labeler: FrameLabeler, shard: Path) -> PlannedBatches:
        return heldout(shard, self.cfg.data.limits, **self._reading(labeler.encoder))

    def _label_shard(self, labeler: FrameLabeler, shard: Path) -> dict[int, UtteranceLabels]:
        """Return {row: labels} of a shard, batched by its own plan; utterances that are unusable have none."""
        data = self._planned(labeler, shard)
        rows, reader = data.dataset.corpus.index(0), PayloadReader()
        labels: dict[int, UtteranceLabels] = {}
        refused = list(data.plan.refused())
        if refused:
            first = f"{refused[0].key}: {refused[0].reason}"
            log.warning(f"{shard}: {len(refused)} utterances are not labelled, the first {first}")
        planned = data.first_seconds(math.inf) if len(refused) < len(rows) else []
        for batch, utterances in self._batches(data, planned):
            labels_BT, frames_B = labeler(batch.waveforms_BN, batch.lengths_B)
            lengths = zip(utterances, labels_BT.cpu().numpy(), frames_B.tolist(), batch.lengths_B.tolist())
            for (_, row), codes_T, frames, samples in lengths:
                audio = reader.read(shard, offset=int(rows["audio_offset"][row]), size=int(rows["audio_size"][row]))
                labels[row] = UtteranceLabels(audio_hash(audio), samples, codes_T[:frames])
        return labels


def chosen_layer(cfg: ClusterLabelsConfig, inputs: dict[str, Artifact]) -> int:
    """Return the layer that the config names, else the one that the probe of this very encoder chose."""
    probe = inputs.get("probe")
    if probe is not None and probe.facts["encoder_manifest"] != inputs["encoder"].hash:
        raise ValueError(
            f"{probe.path}: probed the encoder {probe.facts['encoder_manifest']}, inputs.encoder is "
            f"{inputs['encoder'].hash}; run layer_probe on {inputs['encoder'].path}"
        )
    if cfg.layer:
        return cfg.layer
    if probe is None:
        raise ValueError("which layer? Set layer=N, counted from 1, or inputs.probe to what layer_probe made")
    return probe.facts["layer"]


def what_decides_the_centroids(cfg: ClusterLabelsConfig) -> dict[str, str]:
    """Return what, beside the encoder, a k-means that is gone on from must have been started with."""
    settings = {
        name: getattr(cfg, name) for name in ("clusters", "sample_frames", "sample_share", "batch_seconds", "tolerance")
    }
    return {
        "data.train": Corpus.open(cfg.data.train, remote=cfg.data.remote).fingerprint,
        "settings": json.dumps({**settings, "seed": cfg.seed, "limits": asdict(cfg.data.limits)}),
    }


def usable(batch: AudioBatch, micro_batch: MicroBatch, corpus: Corpus) -> list[tuple[int, int]]:
    """Return the (shard, row) of each utterance in a batch; those that could not be read are named in the log."""
    for bad in batch.bad:
        log.warning(f"bad utterance: {bad}")
    bad_ones = {(bad.shard, bad.key) for bad in batch.bad}
    return [
        (shard, row)
        for shard, row in micro_batch.utterances
        if (str(corpus.shards[shard]), utterance_key(corpus.index(shard)[row])) not in bad_ones
    ]


def hand_over(folder: Path, target: Path, names: list[str], *, codes: int, made_by: str) -> None:
    """Link finished label shards into the artifact (a second name, no second copy) and write their index."""
    target.mkdir()
    for file in (f"{name}.{part}.npy" for name in names for part in ("codes", "rows")):
        try:
            os.link(folder / file, target / file)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / file, target / file)
    write_label_index(target, names, codes=codes, made_by=made_by)


def labels_folder_name(labeler: FrameLabeler) -> str:
    """Return the name of the folder for labels by these very centroids: others may not mix with them."""
    return f"labels-{hashlib.blake2b(labeler.centroids_KD.cpu().numpy().tobytes(), digest_size=8).hexdigest()}"
