"""A toy language, spoken in tones: small enough to be learnt by real stages in seconds, without any download.

Every word is a pair of tones, so that what is heard says which word it is. Sentences are one to three words drawn
without any grammar: a language model cannot guess them, only listen.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from seedling.data.contexts.sidecar import (
    UtteranceContext,
    context_shard_name,
    write_context_index,
    write_context_shard,
)
from seedling.data.index import Corpus, parse_meta
from seedling.data.payload import PayloadReader
from seedling.data.prepare import prepare
from seedling.data.tokenizer import train_bpe
from seedling.launch.job import run_job
from seedling.model.conformer import ConformerConfig, ConformerEncoder
from seedling.model.features import Fbank
from seedling.model.speech_encoder import SpeechEncoder, speech_encoder_facts
from seedling.stages.runtime.artifacts import ArtifactWriter
from seedling.stages.runtime.rendezvous import RANK_VARIABLES, free_port

SAMPLE_RATE = 16000
WORDS = ("call", "Marc", "dim", "lamp", "stop", "six", "go", "open")
TONES_HZ = (400.0, 900.0, 1700.0, 2900.0)
# Every word another pair of tones.
TONES_OF = {word: (TONES_HZ[i % 4], TONES_HZ[(i + 1 + i // 4) % 4]) for i, word in enumerate(WORDS)}
TONES_OF["Mark"] = TONES_OF["Marc"]  # no other word of the language sounds like another; the sentences have none of it
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in RANK_VARIABLES},
    "PYTHONSAFEPATH": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

LM = {
    "max_tokens": 400,
    "lm": {"vocab_size": 340, "dim": 48, "num_layers": 2, "num_heads": 2, "ff_mult": 2},
    "prompts": {"instruction": "Hear"},
    "repetition": {"max_hold": 2, "max_blanks": 1, "drop": 0.0, "substitute": 0.0, "max_mix": 0.2},
    "train": {
        "max_steps": 140,
        "lr": {"llm": 6e-3},
        "warmup_steps": 10,
        "log_every": 20,
        "save_every": 0,
        "dry_run": False,
        "wandb": {"mode": "disabled"},
    },
}
SFT = {
    "prompts": {"instruction": "Hear"},
    "encoder": {
        "dim": 48,
        "num_layers": 1,
        "num_heads": 2,
        "conv_kernel": 5,
        "subsampling_channels": 8,
        "dropout": 0.1,
    },
    "converter": {"stride": 2},
    "ctc_weight": 0.5,
    "cmvn_batches": 2,
    "train": {
        "max_steps": 12,
        "micro_batch_seconds": 4,
        "global_batch_seconds": 8,
        "lr": {"encoder": 1e-2, "converter": 1e-2, "ctc_head": 1e-2, "llm": 1e-3, "lora": 1e-2},
        "warmup_steps": 2,
        "log_every": 1,
        "save_every": 4,
        "wandb": {"mode": "disabled"},
    },
}
PRETRAIN = {
    "encoder": SFT["encoder"],
    "quantizer": {"num_codebooks": 2, "codebook_size": 24},
    "mask": {"start_probability": 0.02, "span_frames": 12},
    "cmvn_batches": 2,
    "train": SFT["train"] | {"lr": {"encoder": 1e-2, "heads": 1e-2}},
}
CONTEXT_SFT = {
    "encoder": {"dropout": 0.1},
    "ctc_weight": 0.5,
    "context": {"share": 0.5, "max_tokens": 200},
    "train": SFT["train"],
}
QUANT_FINETUNE = {
    "ctc_weight": 0.5,
    "train": SFT["train"] | {"lr": {"scales": 1e-2, "norms": 3e-3, "biases": 3e-3}},
}
# To learn a corpus by heart: nothing random in the way, and a third of it in every step.
BY_HEART = (
    "encoder.dropout=0",
    "specaugment.num_time_masks=0",
    "specaugment.num_freq_masks=0",
    "train.max_steps=180",
    "train.micro_batch_seconds=12",
    "train.global_batch_seconds=12",
    "train.log_every=20",
    "train.save_every=0",
)


def speak(text: str, *, seed: int = 0, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return float32 [N]: both tones of each word, 0.12 s each, 0.06 s between words, and noise 15 to 40 dB below."""
    draws = np.random.default_rng(seed)
    time_N = np.arange(round(0.12 * sample_rate)) / sample_rate
    gap = np.zeros(round(0.06 * sample_rate))
    fade = np.minimum(1, np.minimum(time_N, time_N[::-1]) / 0.01)
    parts = [gap]
    for word in text.split():
        parts += [0.3 * fade * np.sin(2 * np.pi * hertz * time_N) for hertz in TONES_OF[word]] + [gap]
    wave = np.concatenate(parts)
    noise = 0.2 * 10 ** draws.uniform(-2, -0.75)
    return (wave + noise * draws.standard_normal(len(wave))).astype(np.float32)


def sentences(count: int, *, seed: int) -> list[str]:
    draws = np.random.default_rng(seed)
    return [" ".join(draws.choice(WORDS, size=draws.integers(1, 4))) for _ in range(count)]


def make_shards(folder: Path, texts: list[str]) -> Path:
    """Speak the texts into FLAC files with a manifest, prepare them, and return the folder of shards."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, text in enumerate(texts):
        wave, file = speak(text, seed=i), folder / f"{i:03d}.flac"
        soundfile.write(file, wave, SAMPLE_RATE)
        lines.append({"audio_filepath": file.name, "duration": len(wave) / SAMPLE_RATE, "text": text})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(manifest, folder / "shards", shard_seconds=12)
    return folder / "shards"


def make_contexts(folder: Path, shards: Path, contexts_of: Callable[[str], list[UtteranceContext]]) -> Path:
    """Write a sidecar with contexts_of(text) for every utterance, as `seedling contextualize` would."""
    folder.mkdir(parents=True)
    corpus, reader = Corpus.open(shards), PayloadReader()
    names = [context_shard_name(number, path) for number, path in enumerate(corpus.shards)]
    for number, (name, path) in enumerate(zip(names, corpus.shards)):
        payloads = (reader.read(path, offset=at["meta_offset"], size=at["meta_size"]) for at in corpus.index(number))
        texts = [parse_meta(payload, is_json=True)["text"] for payload in payloads]
        contexts = {row: contexts_of(text) for row, text in enumerate(texts)}
        write_context_shard(folder, name, shard=path, contexts=contexts)
    write_context_index(folder, names, shards=corpus.shards)
    return folder


def write_yaml(path: Path, values: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def train(stage: str, run_dir: Path, values: dict, *overrides: str) -> Path:
    """Run a stage to its artifact in this process, as `seedling run` would, and return RUN_DIR."""
    run_job(stage, str(write_yaml(run_dir.with_suffix(".yaml"), values)), overrides=[f"run_dir={run_dir}", *overrides])
    return run_dir


def make_llm(folder: Path) -> Path:
    """Write an untrained LLM and its tokenizer: a Hugging Face folder like any other, without a manifest."""
    tokenizer = train_bpe(["Hear", *WORDS], vocab_size=340)
    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=350,  # more rows than the tokenizer has tokens, as in downloaded LLMs
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_speech_encoder(folder: Path, *, seed: int = 0, **shape) -> Path:
    """Write an untrained speech encoder as an artifact, as encoder_pretrain would, and return its folder."""
    torch.manual_seed(seed)
    values = {"dim": 32, "num_layers": 3, "num_heads": 2, "conv_kernel": 5, "subsampling_channels": 8, "dropout": 0.1}
    encoder = SpeechEncoder.assemble(fbank=Fbank(), encoder=ConformerEncoder(ConformerConfig(**{**values, **shape})))
    encoder.fbank.set_cmvn(torch.full((80,), 12.0), torch.full((80,), 4.0))
    writer = ArtifactWriter(folder / "artifact", kind="speech_encoder", stage="encoder_pretrain").start()
    encoder.save_pretrained(writer.path)
    writer.facts |= speech_encoder_facts(encoder)
    return writer.finish().path


class Process:
    """A real process of one rank: `seedling ARGUMENTS`, or one of several ranks of a job. Output goes to a file."""

    def __init__(self, log: Path, *arguments: str, rank: int | None = None, ranks: int = 1, port: int = 0):
        self.log, environment = log, ENVIRONMENT
        module = "seedling.launch.cli" if rank is None else "seedling.launch.job"
        if rank is not None:
            values = (str(rank), str(rank), str(ranks), "127.0.0.1", str(port))
            environment = environment | dict(zip(RANK_VARIABLES, values))
        with log.open("w") as out:
            command = [sys.executable, "-m", module, *map(str, arguments)]
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def wait(self, *, timeout: float = 900) -> int:
        try:
            return self.process.wait(timeout=timeout)
        finally:
            self.process.kill()

    def wait_for_step(self, run_dir: Path, step: int, *, timeout: float = 900) -> None:
        """Return as soon as the run has trained `step` steps."""
        ledger, deadline = run_dir / "ledger.jsonl", time.time() + timeout
        while True:
            ended = self.process.poll() is not None  # asked first: by the next line it may have trained to its end
            if ledger.exists() and ledger.read_text().count("\n") >= step:
                return
            assert time.time() < deadline and not ended, self.log.read_text()[-3000:]
            time.sleep(0.002)


def stage_arguments(stage: str, run_dir: Path, values: dict, *overrides: str) -> list[str]:
    """Return what follows `seedling run` for a stage whose settings are written beside the run."""
    config = write_yaml(run_dir.with_suffix(".yaml"), values)
    return [stage, "--config", str(config), f"run_dir={run_dir}", *overrides]


def kill_and_go_on(run_dir: Path, arguments: list[str], *, step: int) -> None:
    """Run a stage, kill it at a step, and start it again."""
    for _ in range(5):
        first = Process(run_dir.with_name("first.log"), "run", *arguments)
        first.wait_for_step(run_dir, step)
        first.process.send_signal(signal.SIGKILL)
        assert first.wait() in (-signal.SIGKILL, 0), first.log.read_text()[-3000:]
        if not (run_dir / "artifact").exists():
            break
        shutil.rmtree(run_dir)  # on a busy machine it may end before we come to kill it
    else:
        raise AssertionError(f"five times the run had ended before it was killed at step {step}")
    again = Process(run_dir.with_name("again.log"), "run", *arguments)
    assert again.wait() == 0, again.log.read_text()[-3000:]
    assert "resuming from" in again.log.read_text(), f"killed at step {step}"


def curve(run_dir: Path, name: str) -> list[float]:
    """Return the values of a metric, step by step."""
    return [line[name] for line in read_lines(run_dir / "metrics.jsonl") if name in line]


def run_ranks(folder: Path, ranks: int, stage: str, *arguments: str) -> None:
    """Run a stage on several real processes to its end."""
    port = free_port()
    jobs = [Process(folder / f"rank{r}.log", stage, *arguments, rank=r, ranks=ranks, port=port) for r in range(ranks)]
    codes = [job.wait() for job in jobs]
    assert codes == [0] * ranks, "\n".join(job.log.read_text()[-3000:] for job in jobs)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a model folder, or in the artifact of a run."""
    inside = folder / "artifact"
    return load_file((inside if inside.is_dir() else folder) / "model.safetensors")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(run_dir: Path, untouched: Path, *, steps: int, message: str) -> None:
    """Same weights to the bit, and the same utterances in the same steps."""
    assert not differing(weights(run_dir), weights(untouched)), message
    ledger = read_lines(run_dir / "ledger.jsonl")
    assert ledger == read_lines(untouched / "ledger.jsonl"), message
    assert [line["step"] for line in ledger] == list(range(1, steps + 1)), message


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not the same bits."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
