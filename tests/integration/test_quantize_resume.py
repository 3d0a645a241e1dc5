"""quantize killed with SIGKILL at several places: started again it packs the bytes of a run that nothing touched."""

import signal
import time

import pytest
import tiny_runs
import torch

from seedling.model.audio_llm import AudioLLM, acllm_facts
from seedling.model.conformer import ConformerConfig, ConformerEncoder
from seedling.model.converter import ConverterConfig
from seedling.model.llm import load_llm, load_tokenizer
from seedling.stages.runtime.artifacts import ArtifactWriter, load_artifact

QUANTIZE = {
    "bits": 2,
    "group_size": 16,
    "seconds": 15,
    "batch_seconds": 4,
    "budget": 6.0,
    "candidates": [2, 3],
    "refine": {"epochs": 2},
}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """An untrained recogniser and a corpus to calibrate on."""
    folder = tmp_path_factory.mktemp("toy")
    shards = tiny_runs.make_shards(folder / "corpus", tiny_runs.sentences(24, seed=1))
    llm = tiny_runs.make_llm(folder / "llm")
    torch.manual_seed(2)
    shape = {"dim": 32, "num_layers": 2, "num_heads": 2, "conv_kernel": 5, "subsampling_channels": 8, "dropout": 0.0}
    model = AudioLLM.assemble(
        encoder=ConformerEncoder(ConformerConfig(**shape)),
        llm=load_llm(llm),
        tokenizer=load_tokenizer(llm),
        converter=ConverterConfig(stride=2),
    )
    model.fbank.set_cmvn(torch.full((80,), 12.0), torch.full((80,), 4.0))
    writer = ArtifactWriter(folder / "acllm/artifact", kind="acllm", stage="sft").start()
    model.save_pretrained(writer.path)
    writer.facts |= acllm_facts(model)
    return [f"inputs.acllm={writer.finish().path}", f"data.train=[{shards}]"]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, given):
    return tiny_runs.train("quantize", tmp_path_factory.mktemp("untouched") / "run", QUANTIZE, *given)


def packed_bytes(run_dir) -> bytes:
    return (run_dir / "artifact/model.safetensors").read_bytes()


def start(run_dir, given, *, log) -> tiny_runs.Process:
    return tiny_runs.Process(log, "run", *tiny_runs.stage_arguments("quantize", run_dir, QUANTIZE, *given))


def kill_when_there_are(process: tiny_runs.Process, count: int, *, pattern: str, run_dir) -> None:
    """Send SIGKILL as soon as so many blocks are kept; what comes after them is then half done."""
    deadline = time.time() + 900
    while len(list((run_dir / "checkpoints").glob(pattern))) < count:
        assert time.time() < deadline and process.process.poll() is None, process.log.read_text()[-3000:]
        time.sleep(0.001)
    process.process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_three_times_packs_the_same_bytes(tmp_path, given, untouched):
    """While sensitivities are measured, in the encoder, and in the LLM."""
    run_dir, solved = tmp_path / "run", "[!s]*layers*.safetensors"
    for at, (count, pattern) in enumerate([(2, "sensitivity-*.safetensors"), (1, solved), (3, solved)]):
        process = start(run_dir, given, log=tmp_path / f"{at}.log")
        kill_when_there_are(process, count, pattern=pattern, run_dir=run_dir)
        assert not (run_dir / "artifact").exists()
    written = {file: file.stat().st_mtime_ns for file in (run_dir / "checkpoints").glob(solved)}
    last = start(run_dir, given, log=tmp_path / "last.log")
    assert last.wait() == 0, last.log.read_text()[-3000:]
    assert len(written) >= 3 and all(file.stat().st_mtime_ns == when for file, when in written.items())
    assert packed_bytes(run_dir) == packed_bytes(untouched)
    metrics = [load_artifact(folder / "artifact").metrics for folder in (run_dir, untouched)]
    assert metrics[0] == metrics[1]
