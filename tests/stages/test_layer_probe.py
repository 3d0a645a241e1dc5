"""layer_probe: a layer ends as if trained alone, the encoder stays as it was, and the choice is explained."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from seedling.data.loader import STAND_IN_KEY, AudioBatch
from seedling.launch.cli import main
from seedling.model.ctc import text_bytes
from seedling.model.speech_encoder import SpeechEncoder
from seedling.stages.layer_probe import LayerProbe, ProbedEncoder, choose_layer
from seedling.stages.runtime.artifacts import lineage, load_artifact

PROBE = {
    "train": {
        "max_steps": 12,
        "micro_batch_seconds": 8,
        "global_batch_seconds": 16,
        "lr": {"ctc_head": 2e-2},
        "warmup_steps": 2,
        "log_every": 4,
        "save_every": 0,
        "wandb": {"mode": "disabled"},
    },
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_runs.make_speech_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def probe(tmp_path_factory, shards, encoder):
    """probe(*overrides) -> the finished artifact's folder"""

    def run(*overrides):
        run_dir = tmp_path_factory.mktemp("probe") / "run"
        given = [f"inputs.encoder={encoder}", f"data.train=[{shards}]", f"data.valid.dev={shards}"]
        return tiny_runs.train("layer_probe", run_dir, PROBE, *given, *overrides) / "artifact"

    return run


@pytest.fixture(scope="module")
def every_layer(probe):
    return probe()


def test_the_artifact_holds_the_chosen_layer_the_errors_of_all_and_a_figure(every_layer, encoder):
    artifact = load_artifact(every_layer, kind="layer_probe")
    report = json.loads((every_layer / "layers.json").read_text())
    rows = report["sets"]["dev"]
    assert list(rows) == ["1", "2", "3"] and all(set(row) == {"wer", "cer", "loss"} for row in rows.values())
    assert report["layer"] == artifact.facts["layer"] == artifact.metrics["layer"]
    assert artifact.facts["layer"] == min(
        (1, 2, 3), key=lambda n: tuple(rows[str(n)][m] for m in ("wer", "cer", "loss"))
    )
    assert artifact.facts["chosen_by"] == "lowest wer on dev"
    assert artifact.metrics["wer"] == rows[str(report["layer"])]["wer"]
    assert artifact.facts["encoder_manifest"] == load_artifact(encoder).hash
    assert [(a.name, a.kind) for a in lineage(every_layer)] == [("", "layer_probe"), ("encoder", "speech_encoder")]
    figure = (every_layer / "layers.svg").read_text()
    assert ElementTree.fromstring(figure).tag.endswith("svg") and f"chosen: layer {report['layer']}" in figure


@pytest.mark.parametrize("layer", [1, 3])
def test_a_layer_ends_as_if_it_had_been_trained_alone(probe, every_layer, layer):
    alone = probe(f"layers=[{layer}]")
    together, single = (load_file(folder / "heads.safetensors") for folder in (every_layer, alone))
    assert set(single) < set(together) and all(name.startswith(f"{layer}.") for name in single)
    for name, value in single.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=0, msg=lambda text, name=name: name + text)
    rows = [json.loads((folder / "layers.json").read_text())["sets"]["dev"] for folder in (every_layer, alone)]
    assert rows[0][str(layer)] == rows[1][str(layer)]


def test_the_heads_learn_and_the_encoder_does_not(every_layer, encoder):
    lines = tiny_runs.read_lines(every_layer.parent / "metrics.jsonl")
    for n in (1, 2, 3):
        losses = [line[f"train/layer_{n:02d}/loss"] for line in lines if f"train/layer_{n:02d}/loss" in line]
        assert losses[-1] < losses[0]
    facts = load_artifact(every_layer).facts
    heads = sum(value.numel() for value in load_file(every_layer / "heads.safetensors").values())
    assert (
        facts["trainable_parameters"]
        == heads
        == facts["parameters"] - sum(p.numel() for p in SpeechEncoder.from_pretrained(encoder).parameters())
    )


def test_the_errors_are_those_of_greedy_ctc_on_that_layer(every_layer, encoder, texts):
    """The loss of one layer, recomputed with torch's own CTC on utterances one at a time."""
    heads = load_file(every_layer / "heads.safetensors")
    model = SpeechEncoder.from_pretrained(encoder)
    total = 0.0
    for i, text in enumerate(texts):
        wave = torch.from_numpy(tiny_runs.speak(text, seed=i))[None].mul(32768).round().div(32768)
        with torch.no_grad():
            _, lengths_B, layers = model(wave, torch.tensor([wave.shape[1]]), return_layers=True)
        h_TD = torch.nn.functional.layer_norm(layers[1][0], (32,), heads["2.0.weight"], heads["2.0.bias"])
        log_probs = (h_TD @ heads["2.1.proj.weight"].T + heads["2.1.proj.bias"]).log_softmax(-1)
        target = torch.tensor(text_bytes(text))
        loss = torch.nn.functional.ctc_loss(log_probs, target, lengths_B[0], torch.tensor(len(target)), blank=256)
        total += float(loss) * len(target) if torch.isfinite(loss) else 0.0
    rows = json.loads((every_layer / "layers.json").read_text())["sets"]["dev"]
    assert rows["2"]["loss"] == pytest.approx(total / sum(len(text_bytes(text)) for text in texts), rel=2e-3)


def test_the_encoder_stays_in_evaluation_mode_so_its_dropout_is_off(encoder):
    model = ProbedEncoder(SpeechEncoder.from_pretrained(encoder), [1, 2]).train()
    assert model.training and not any(module.training for module in model.encoder.modules())
    wave = torch.from_numpy(tiny_runs.speak("call Marc"))[None]
    a, b = (model(wave, torch.tensor([wave.shape[1]]))[0] for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in (1, 2))


def test_a_choice_among_layers_that_all_fail_is_warned_of(probe, caplog):
    probe("train.max_steps=1")
    assert "all layers have a wer near 1 on dev" in caplog.text and "train longer" in caplog.text


def test_equal_errors_are_told_apart_by_the_others_then_by_depth():
    rows = {n: {"wer": 1.0, "cer": 0.5, "loss": 2.0} for n in (1, 2, 3, 4)}
    assert choose_layer(rows, by="wer") == 1
    rows[4]["cer"] = 0.4
    assert choose_layer(rows, by="wer") == 4
    rows[3]["wer"] = 0.9
    assert choose_layer(rows, by="wer") == 3 and choose_layer(rows, by="cer") == 4


def test_a_stand_in_for_unreadable_audio_has_no_loss(encoder):
    stage = LayerProbe()
    batch = AudioBatch([STAND_IN_KEY], torch.zeros(1, 16000), torch.tensor([16000]), [""], [{}], 0, 0)
    assert stage.loss(ProbedEncoder(SpeechEncoder.from_pretrained(encoder), [1]), batch).loss_sum.item() == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["layers=[4]"], "layers has 4"),
        (["choose_by=mer"], "choose_by is 'mer'; choose one of wer, cer, loss"),
        (["choose_on=test"], "choose_on (test) is none of data.valid: dev"),
        (["data.valid={}"], "set data.valid.dev=DIR"),
        (["train.grad_clip=1.0"], "set train.grad_clip=0"),
        (["inputs.encoder=SHARDS"], "manifest.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(encoder, shards, tmp_path, capsys, given, said):
    given = [text.replace("SHARDS", str(shards)) for text in given]
    config = tiny_runs.write_yaml(tmp_path / "probe.yaml", PROBE)
    arguments = [f"run_dir={tmp_path}/run", f"inputs.encoder={encoder}", f"data.train=[{shards}]"]
    arguments += [] if "data.valid={}" in given else [f"data.valid.dev={shards}"]
    assert main(["run", "layer_probe", "--config", str(config), *arguments, *given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seedling: error:")]
    assert len(errors) == 1 and said in errors[0], errors


def test_check_says_what_would_be_trained(encoder, shards, tmp_path, capsys):
    config = tiny_runs.write_yaml(tmp_path / "probe.yaml", PROBE)
    given = [
        f"run_dir={tmp_path}/run",
        f"inputs.encoder={encoder}",
        f"data.train=[{shards}]",
        f"data.valid.dev={shards}",
    ]
    assert main(["check", "layer_probe", "--config", str(config), *given]) == 0
    assert "ctc_head" in capsys.readouterr().out
