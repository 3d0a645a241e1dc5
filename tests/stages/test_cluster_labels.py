"""cluster_labels: centroids as good as scikit-learn's, labels that are the nearest of them, the same on any ranks.

Shape letters: N frames, D width, K clusters.
"""

import json
import shutil

import numpy as np
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from sklearn.cluster import KMeans as ScikitKMeans

from seedling.data.frame_labels import FrameLabels, StaleLabels
from seedling.data.index import Corpus
from seedling.data.loader import AudioDataset, utterance_key
from seedling.data.plan import MicroBatch
from seedling.launch.cli import main
from seedling.model.frame_labeler import FrameLabeler
from seedling.model.speech_encoder import SpeechEncoder
from seedling.stages.runtime.artifacts import ArtifactWriter, lineage, load_artifact

K, LAYER = 24, 2
CLUSTERS = {"clusters": K, "layer": LAYER, "sample_frames": 400, "batch_seconds": 6, "iterations": 60}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_runs.make_speech_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return tiny_runs.make_shards(tmp_path_factory.mktemp("dev"), tiny_runs.sentences(5, seed=9))


@pytest.fixture(scope="module")
def given(shards, dev, encoder):
    return [f"inputs.encoder={encoder}", f"data.train=[{shards}]", f"data.valid.dev={dev}"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, given):
    """cluster(*overrides) -> the finished artifact's folder"""

    def run(*overrides):
        run_dir = tmp_path_factory.mktemp("cluster") / "run"
        return tiny_runs.train("cluster_labels", run_dir, CLUSTERS, *given, *overrides) / "artifact"

    return run


@pytest.fixture(scope="module")
def labeler(cluster):
    return cluster()


def batches(*folders):
    """Every utterance of a corpus, as (reader of labels) -> AudioBatch of a few."""
    corpus = Corpus.open(list(map(str, folders)))
    rows = [(shard, row) for shard in range(len(corpus.shards)) for row in range(len(corpus.index(shard)))]
    for start in range(0, len(rows), 7):
        yield corpus, MicroBatch(0, 0, tuple(rows[start : start + 7]))


def frames_by_utterance(encoder, *folders) -> dict[str, np.ndarray]:
    """{key: frames_TD of LAYER}, one utterance at a time."""
    model, found = SpeechEncoder.from_pretrained(encoder), {}
    for corpus, micro_batch in batches(*folders):
        for utterance in micro_batch.utterances:
            batch = AudioDataset(corpus)[MicroBatch(0, 0, (utterance,))]
            with torch.no_grad():
                _, lengths_B, layers = model(batch.waveforms_BN, batch.lengths_B, return_layers=True)
            found[f"{corpus.shards[utterance[0]]}/{batch.keys[0]}"] = layers[LAYER - 1][0, : lengths_B[0]].numpy()
    return found


def labels_by_utterance(folder, *folders) -> dict[str, np.ndarray]:
    labels, found = FrameLabels.open(folder / "labels"), {}
    for corpus, micro_batch in batches(*folders):
        batch = AudioDataset(corpus, labels=labels)[micro_batch]
        assert not batch.bad
        for (shard, row), codes_T, length in zip(micro_batch.utterances, batch.labels_BT, batch.label_lengths_B):
            found[f"{corpus.shards[shard]}/{utterance_key(corpus.index(shard)[row])}"] = codes_T[:length].numpy()
    return found


def far_apart(squared_NK: np.ndarray) -> np.ndarray:
    """Which frames have one centroid clearly nearer than every other: rounding cannot change their label."""
    two_N2 = np.sort(squared_NK, axis=1)[:, :2]
    return two_N2[:, 1] - two_N2[:, 0] > 1e-4 * two_N2[:, 1]


def squared(frames_ND, centroids_KD) -> np.ndarray:
    return np.square(frames_ND.astype(np.float64)[:, None] - centroids_KD.astype(np.float64)).sum(-1)


def centroids_of(folder) -> np.ndarray:
    return load_file(folder / "centroids.safetensors")["centroids_KD"].numpy()


def test_the_artifact_says_what_it_was_made_from_and_how_its_codes_are_used(labeler, encoder, shards, dev):
    artifact = load_artifact(labeler, kind="frame_labeler")
    whole = load_artifact(encoder)
    assert artifact.facts["encoder_manifest"] == whole.hash and artifact.facts["layer"] == LAYER
    assert artifact.facts["feature_fingerprint"] == whole.facts["feature_fingerprint"]
    assert [(a.name, a.kind) for a in lineage(labeler)] == [("", "frame_labeler"), ("encoder", "speech_encoder")]
    codes = np.concatenate(list(labels_by_utterance(labeler, shards, dev).values()))
    share_K = np.bincount(codes, minlength=K) / len(codes)
    entropy = -(share_K[share_K > 0] * np.log(share_K[share_K > 0])).sum()
    assert artifact.metrics["code_perplexity"] == pytest.approx(np.exp(entropy))
    assert artifact.metrics["code_usage"] == (share_K > 0).mean()
    assert artifact.metrics["labelled_frames"] == len(codes)
    assert artifact.metrics["code_perplexity"] > 0.2 * K


def test_the_encoder_in_it_ends_at_the_layer(labeler, encoder):
    cut = FrameLabeler.from_pretrained(labeler).encoder
    assert len(cut.encoder.layers) == LAYER < len(SpeechEncoder.from_pretrained(encoder).encoder.layers)


def test_every_frame_and_no_padding_has_the_code_of_its_nearest_centroid(labeler, encoder, shards, dev):
    frames, labels = frames_by_utterance(encoder, shards, dev), labels_by_utterance(labeler, shards, dev)
    assert frames.keys() == labels.keys() and len(frames) == 48 + 5
    for key, frames_TD in frames.items():
        squared_TK = squared(frames_TD, centroids_of(labeler))
        assert len(labels[key]) == len(frames_TD), key
        clear = far_apart(squared_TK)
        assert clear.mean() > 0.9
        assert (labels[key] == squared_TK.argmin(1))[clear].all(), key


def test_sidecars_and_labels_on_the_fly_agree(labeler, shards):
    model = FrameLabeler.from_pretrained(labeler)
    differing = total = 0
    for corpus, micro_batch in batches(shards):
        batch = AudioDataset(corpus, labels=FrameLabels.open(labeler / "labels"))[micro_batch]
        labels_BT, lengths_B = model(batch.waveforms_BN, batch.lengths_B)
        assert torch.equal(lengths_B, batch.label_lengths_B) and labels_BT.shape == batch.labels_BT.shape
        differing += int((labels_BT != batch.labels_BT).sum())
        total += int(lengths_B.sum())
    assert differing <= 0.001 * total, f"{differing} of {total} frames: only those that rounding can turn may differ"


def test_inertia_is_within_one_percent_of_scikit_learn_on_all_frames(cluster, encoder, shards):
    """The sample is larger than the corpus, so every frame of data.train is in it."""
    folder = cluster("sample_frames=100000", "write_labels=false", "tolerance=1e-6")
    frames_ND = np.concatenate(list(frames_by_utterance(encoder, shards).values()))
    metrics = load_artifact(folder).metrics
    assert metrics["sampled_frames"] == len(frames_ND) and metrics["labelled_frames"] == 0
    theirs = [ScikitKMeans(K, random_state=seed).fit(frames_ND).inertia_ for seed in range(5)]
    assert metrics["inertia"] * len(frames_ND) <= 1.01 * np.median(theirs)
    ours = squared(frames_ND, centroids_of(folder)).min(1).sum()
    assert metrics["inertia"] * len(frames_ND) == pytest.approx(ours, rel=1e-4)
    assert not (folder / "labels").exists()


def test_the_sample_has_the_size_asked_for_and_the_seed_chooses_it(labeler, cluster):
    assert load_artifact(labeler).metrics["sampled_frames"] == pytest.approx(400, rel=0.2)
    other = cluster("seed=2", "write_labels=false")
    assert load_artifact(other).metrics["sampled_frames"] == pytest.approx(400, rel=0.2)
    assert not np.allclose(centroids_of(other), centroids_of(labeler))


def test_two_processes_find_the_centroids_and_the_labels_of_one(labeler, given, tmp_path, shards, dev):
    config = tiny_runs.write_yaml(tmp_path / "cluster.yaml", CLUSTERS)
    tiny_runs.run_ranks(tmp_path, 2, "cluster_labels", "--config", str(config), f"run_dir={tmp_path}/run", *given)
    several = tmp_path / "run/artifact"
    np.testing.assert_allclose(centroids_of(several), centroids_of(labeler), rtol=1e-6, atol=1e-6)
    metrics = [load_artifact(folder).metrics for folder in (several, labeler)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-9)
    one, many = (labels_by_utterance(folder, shards, dev) for folder in (labeler, several))
    assert all(np.array_equal(one[key], many[key]) for key in one)


def test_workers_that_read_audio_change_nothing(labeler, cluster):
    files = [load_artifact(folder).manifest["files"] for folder in (cluster("num_workers=2"), labeler)]
    assert files[0] == files[1]


def test_the_layer_comes_from_the_probe_of_this_very_encoder(cluster, encoder, tmp_path, given, capsys):
    def probe(name, **facts):
        writer = ArtifactWriter(tmp_path / name, kind="layer_probe", stage="layer_probe", facts=facts).start()
        return writer.finish().path

    right = probe("right", layer=1, encoder_manifest=load_artifact(encoder).hash)
    folder = cluster("layer=0", f"inputs.probe={right}", "write_labels=false")
    assert load_artifact(folder).facts["layer"] == 1
    wrong = probe("wrong", layer=1, encoder_manifest="another")
    arguments = ["layer=0", f"inputs.probe={wrong}", f"run_dir={tmp_path}/run", *given]
    assert main(["run", "cluster_labels", *arguments]) == 2
    assert "wrong: probed the encoder another, inputs.encoder is" in capsys.readouterr().err


def test_finished_labels_are_taken_over_and_a_new_run_finds_the_same(given, tmp_path):
    run_dir = tiny_runs.train("cluster_labels", tmp_path / "run", CLUSTERS, *given)
    first = load_artifact(run_dir / "artifact").manifest["files"]
    kept = list((run_dir / "checkpoints").glob("labels-*/*"))
    times = [file.stat().st_mtime_ns for file in kept]
    tiny_runs.train("cluster_labels", tmp_path / "run", CLUSTERS, *given)
    assert load_artifact(run_dir / "artifact").manifest["files"] == first
    assert times == [file.stat().st_mtime_ns for file in kept] and len(kept) >= 8


def test_work_begun_with_another_encoder_or_setting_is_not_gone_on_with(given, tmp_path, capsys):
    run_dir = tiny_runs.train("cluster_labels", tmp_path / "run", CLUSTERS, *given, "write_labels=false")
    other = tiny_runs.make_speech_encoder(tmp_path / "other", seed=5)
    config = ["run", "cluster_labels", "--config", str(run_dir.with_suffix(".yaml")), f"run_dir={run_dir}", *given]
    before = load_artifact(run_dir / "artifact").hash
    for change, said in ((f"inputs.encoder={other}", "begun with encoder"), ("clusters=25", "begun with settings")):
        assert main([*config, change]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
        assert said in error and "resume=never" in error
    assert load_artifact(run_dir / "artifact").hash == before
    assert main([*config, f"inputs.encoder={other}", "resume=never", "write_labels=false"]) == 0
    assert load_artifact(run_dir / "artifact").hash != before


def test_labels_of_changed_audio_are_refused_when_they_are_read(labeler, shards, tmp_path):
    changed = shutil.copytree(shards, tmp_path / "changed")
    corpus = Corpus.open(str(changed))
    at = corpus.index(0)[0]
    payload = corpus.shards[0].read_bytes()
    middle = int(at["audio_offset"]) + int(at["audio_size"]) - 1
    corpus.shards[0].write_bytes(payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :])
    audio = corpus.shards[0].read_bytes()[int(at["audio_offset"]) :][: int(at["audio_size"])]
    with pytest.raises(StaleLabels, match=r"shard-000000.tar: \S+: its audio has changed.*run cluster_labels again"):
        FrameLabels.open(labeler / "labels").read(corpus.shards[0], 0, audio=audio)


def test_what_cannot_be_labelled_is_named_and_only_much_of_it_is_an_error(
    given, dev, encoder, tmp_path, caplog, capsys
):
    broken = shutil.copytree(dev, tmp_path / "broken")
    corpus = Corpus.open(str(broken))
    at = corpus.index(0)[0]
    with corpus.shards[0].open("r+b") as handle:
        handle.seek(int(at["audio_offset"]))
        handle.write(bytes(200))
    run_dir, config = tmp_path / "run", tiny_runs.write_yaml(tmp_path / "cluster.yaml", CLUSTERS)
    arguments = [f"run_dir={run_dir}", *given[:2], f"data.valid.dev={broken}"]
    assert main(["run", "cluster_labels", "--config", str(config), *arguments]) == 2
    assert "1 of 53 utterances could not be labelled, more than max_bad_fraction=0.01" in capsys.readouterr().err
    assert f"bad utterance: {corpus.shards[0]}: {utterance_key(at)}" in caplog.text
    assert main(["run", "cluster_labels", "--config", str(config), *arguments, "max_bad_fraction=0.1"]) == 0
    labels = FrameLabels.open(run_dir / "artifact/labels")
    with pytest.raises(ValueError, match="has no frame labels"):
        labels.read(corpus.shards[0], 0, audio=b"")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["layer=0"], "which layer? Set layer=N, counted from 1, or inputs.probe"),
        (["layer=4"], "layer (4) must be 1 to 3"),
        (["clusters=70000"], "clusters is 70000; a code has two bytes"),
        (["sample_share=0"], "sample_share is 0"),
        (["sample_frames=9"], "sample_frames (9) must be at least clusters (24)"),
        (["data.train=[]"], "data.train is empty"),
        (["data.augment.speed_probability=0.5"], "labels are those of clean audio"),
        (["clusters=5000", "sample_frames=5000"], "frames cannot make 5000 clusters"),
        (["inputs.encoder=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(given, tmp_path, capsys, change, said):
    config = tiny_runs.write_yaml(tmp_path / "cluster.yaml", CLUSTERS)
    assert main(["run", "cluster_labels", "--config", str(config), f"run_dir={tmp_path}/run", *given, *change]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(errors) == 1 and said in errors[0], errors
    assert not (tmp_path / "run/artifact").exists()


def test_the_label_index_counts_what_was_labelled(labeler, shards, dev):
    index = json.loads((labeler / "labels/index.json").read_text())
    labels = labels_by_utterance(labeler, shards, dev)
    assert sum(shard["utterances"] for shard in index["shards"]) == len(labels)
    assert sum(shard["frames"] for shard in index["shards"]) == sum(map(len, labels.values()))
    assert index["codes"] == K and index["made_by"] == load_artifact(labeler).facts["encoder_manifest"]
