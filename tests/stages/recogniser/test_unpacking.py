"""A packed recogniser says what its dequantised twin says, whatever part of it is kept dense."""

import logging
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from packed_layers import make_recogniser, pack_all
from torch import nn

import seedling
from seedling.launch.cli import main
from seedling.model.audio_llm import AudioLLM, acllm_facts
from seedling.model.decoding import DecodeConfig
from seedling.quant.hf import declare_packed
from seedling.quant.packed_model import packed_modules, replace_module
from seedling.quant.unpacked import UnpackedLinear
from seedling.stages.evaluate import EvaluateConfig
from seedling.stages.recogniser.decoding import load_recogniser
from seedling.stages.recogniser.unpacking import unpack_recogniser
from seedling.stages.runtime.artifacts import ArtifactWriter, load_artifact
from seedling.stages.runtime.world import World
from seedling.stages.transcribe import Recogniser


def written(folder: Path, model: AudioLLM) -> Path:
    writer = ArtifactWriter(folder, kind="acllm", stage="quantize").start()
    model.save_pretrained(writer.path)
    writer.facts |= acllm_facts(model)
    return writer.finish().path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """Random weights that write long texts."""
    model = make_recogniser("llama")
    pack_all(model)
    declare_packed(model)
    model.config.decode = {"beam_size": 3, "nbest": 3, "ctc_weight": 0.2, "max_new_tokens": 12}
    return written(tmp_path_factory.mktemp("packed") / "artifact", model)


@pytest.fixture(scope="module")
def twin(artifact) -> Recogniser:
    """The same model of plain layers with dequantised weights."""
    model = AudioLLM.from_pretrained(artifact)
    for name, packed in packed_modules(model).items():
        dense = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
        dense.weight.data = packed.dequantised_NK()
        if packed.bias is not None:
            dense.bias.data = packed.bias.data
        replace_module(model, name, dense)
    return Recogniser(model)


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [0.1 * rng.standard_normal(n).astype(np.float32) for n in (16000, 9000, 24000, 12000)]


def unpacked(model: AudioLLM) -> set[str]:
    return {name for name, module in packed_modules(model).items() if isinstance(module, UnpackedLinear)}


@pytest.mark.parametrize("gb", [None, 0.0, 0.0001])
def test_texts_and_scores_are_those_of_the_dequantised_model(artifact, twin, audio, gb):
    recogniser = seedling.load(artifact, device="cpu", unpack_gb=gb)
    found, every = unpacked(recogniser.model), set(packed_modules(recogniser.model))
    if gb:
        assert "llm.model.layers.0.self_attn.q_proj" in found < every
    else:
        assert found == (every if gb is None else set())
    for settings in ({}, {"beam_size": 1, "nbest": 1, "ctc_weight": 0.0}):
        for heard, wanted in zip(recogniser.transcribe(audio, **settings), twin.transcribe(audio, **settings)):
            assert [text for text, _ in heard.nbest] == [text for text, _ in wanted.nbest] and heard.text
            scores = [[score for _, score in one.nbest] for one in (heard, wanted)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_stages_that_decode_take_the_setting(artifact):
    world = World(0, 1, torch.device("cpu"))
    for gb, wanted in ((None, True), (0, False)):
        cfg = EvaluateConfig(stage="evaluate", run_dir="somewhere", data="somewhere", unpack_gb=gb)
        model, decode = load_recogniser(load_artifact(artifact), cfg, world)
        assert bool(unpacked(model)) == wanted and decode == DecodeConfig(**model.config.decode)


@pytest.mark.parametrize(("here", "elsewhere"), [(1, 0), (1, 7), (3, 7)])
def test_free_memory_is_shared_by_the_ranks_of_one_machine(artifact, monkeypatch, here, elsewhere):
    hosts = [socket.gethostname()] * here + [f"node{number}" for number in range(elsewhere)]
    monkeypatch.setattr(World, "gather", lambda self, value: hosts)
    packed = packed_modules(AudioLLM.from_pretrained(artifact)).values()
    every = 4 * sum(module.in_features * module.out_features for module in packed)  # bytes of all weights
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * every))
    cfg = EvaluateConfig(stage="evaluate", run_dir="somewhere", data="somewhere")
    model, _ = load_recogniser(load_artifact(artifact), cfg, World(0, len(hosts), torch.device("cpu")))
    dense = sum(module.dense_NK.nbytes for module in model.modules() if isinstance(module, UnpackedLinear))
    assert 0.9 * every / here < dense <= every / here


def test_what_is_kept_dense_is_logged(artifact, caplog):
    model = AudioLLM.from_pretrained(artifact)
    count = len(packed_modules(model))
    with caplog.at_level(logging.INFO):
        unpack_recogniser(model, gb=0.0)
        unpack_recogniser(model, gb=None)
    assert (
        f"0 of {count} packed modules have dense weights too, 0.000 GB; {count} are read as codes (slow" in caplog.text
    )
    assert f"{count} of {count} packed modules have dense weights too, 0.001 GB; 0 are read as codes\n" in caplog.text


@pytest.mark.parametrize("gb", ["-1", "nan"])
def test_an_amount_that_is_none_is_one_line_and_exit_2(artifact, gb, capsys):
    assert main(["transcribe", str(artifact), "a.wav", "--unpack-gb", gb]) == 2
    assert f"unpack_gb is {float(gb):g}; give the GB" in capsys.readouterr().err


def test_an_amount_for_a_recogniser_without_packed_weights_is_refused():
    model = make_recogniser()
    unpack_recogniser(model, gb=None)
    with pytest.raises(ValueError, match="unpack_gb is 1 and the recogniser has no packed weights; leave it out"):
        unpack_recogniser(model, gb=1.0)
