"""What `seedling plan` says of a rank's memory, against what real runs take: resident growth of the process.

Nine runs of different stages, ZeRO stages, precisions, optimizers and numbers of ranks train two steps on noise, each
in fresh processes, through the trainer as `seedling run` has it. Resident growth is the process's peak less what it had
before the model was built, with all libraries loaded. `tensors` is the peak of tensor storages in the same run, counted
as torch dispatches them in a second run: what is between it and the resident growth is the allocator's and the kernels'
own. glibc keeps freed blocks of up to 32 MB for reuse, by default; here those from 64 KB on go back to the system
(MALLOC_MMAP_THRESHOLD_), else the history of its free lists is measured: at 1 MB they held 190 MB of 0.7 GB.

    .venv/bin/python benchmarks/plan_memory.py [NAME...]
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import yaml

SAMPLE_RATE = 16000
BOUND = 0.08
ENCODER = {"dim": 512, "num_layers": 6, "num_heads": 8, "subsampling_channels": 64, "dropout": 0.0}
TRAIN = {
    "max_steps": 2,
    "micro_batch_seconds": 16,
    "global_batch_seconds": 16,
    "save_every": 0,
    "log_every": 1,
    "wandb": {"mode": "disabled"},
}
SSL_LR, ASR_LR = {"encoder": 1e-4, "heads": 1e-4}, {"encoder": 1e-4, "converter": 1e-4, "ctc_head": 1e-4, "llm": 1e-5}
RUNS = {
    "pretrain_zero0": ("encoder_pretrain", 1, {"encoder": ENCODER, "train": TRAIN | {"lr": SSL_LR}}),
    "pretrain_muon": (
        "encoder_pretrain",
        1,
        {
            "encoder": ENCODER | {"dim": 640},
            "train": TRAIN | {"lr": SSL_LR, "optimizer": "muon", "global_batch_seconds": 32},
        },
    ),
    "pretrain_zero2_bf16": (
        "encoder_pretrain",
        2,
        {
            "encoder": ENCODER | {"dim": 768, "activation_checkpointing": True},
            "train": TRAIN | {"lr": SSL_LR, "zero_stage": 2, "precision": "bf16", "global_batch_seconds": 32},
        },
    ),
    "sft_zero1_bf16": (
        "sft",
        1,
        {
            "encoder": ENCODER,
            "ctc_weight": 0.5,
            "train": TRAIN
            | {"lr": ASR_LR, "zero_stage": 1, "precision": "bf16", "micro_batch_seconds": 32}
            | {"global_batch_seconds": 32},
        },
    ),
    "sft_full_zero3": (
        "sft",
        2,
        {
            "encoder": ENCODER,
            "llm_training": "full",
            "train": TRAIN | {"lr": ASR_LR, "zero_stage": 3, "global_batch_seconds": 32},
        },
    ),
    "mwer_zero2": (
        "mwer",
        2,
        {"ctc_weight": 0.5, "train": TRAIN | {"lr": ASR_LR, "zero_stage": 2, "global_batch_seconds": 32}},
    ),
    "sft_lora_zero0": (
        "sft",
        1,
        {
            "encoder": ENCODER | {"dim": 640, "num_layers": 8, "activation_checkpointing": True},
            "llm_training": "lora",
            "ctc_weight": 0.5,
            "train": TRAIN | {"lr": ASR_LR | {"lora": 1e-4}, "micro_batch_seconds": 48, "global_batch_seconds": 96},
        },
    ),
    "sft_zero3_bf16": (
        "sft",
        2,
        {
            "encoder": ENCODER | {"num_layers": 8},
            "ctc_weight": 0.5,
            "train": TRAIN
            | {"lr": ASR_LR, "zero_stage": 3, "precision": "bf16", "micro_batch_seconds": 32}
            | {"global_batch_seconds": 64},
        },
    ),
    "lm_pretrain_zero2": (
        "lm_pretrain",
        2,
        {
            "lm": {"vocab_size": 2000, "dim": 768, "num_layers": 10, "num_heads": 12},
            "max_tokens": 400,
            "train": TRAIN | {"lr": {"llm": 1e-4}, "zero_stage": 2, "global_batch_seconds": 32},
        },
    ),
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONSAFEPATH": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": str(2**16),
    "MALLOC_ARENA_MAX": "1",
}


def make_corpus(folder: Path) -> Path:
    """Write 24 utterances of 8 s of noise with sentences, as shards."""
    from seedling.data.prepare import prepare

    folder.mkdir(parents=True)
    lines, draws = [], np.random.default_rng(0)
    for i in range(24):
        file = folder / f"{i:02d}.wav"
        soundfile.write(file, 0.1 * draws.standard_normal(8 * SAMPLE_RATE).astype(np.float32), SAMPLE_RATE)
        text = " ".join(draws.choice(["call", "Mark", "dim", "lamp", "stop", "six", "go", "open"], size=12))
        lines.append({"audio_filepath": file.name, "duration": 8.0, "text": text})
    (folder / "text.txt").write_text("".join(line["text"] + "\n" for line in lines))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(folder / "manifest.jsonl", folder / "shards", shard_seconds=100)
    return folder / "shards"


def make_llm(folder: Path) -> Path:
    """Write an untrained LLM of 90 M parameters and its tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from seedling.data.tokenizer import train_bpe

    tokenizer = train_bpe(["call Mark dim lamp stop six go open Transcribe the speech"], vocab_size=340)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(name: str, work: Path):
    """Return the stage class and the config of a run."""
    from seedling.launch.stage_lookup import load_stage_config

    stage, _, values = RUNS[name]
    acllm = {"acllm": str(work / "acllm" / "artifact")}
    inputs = {"sft": {"llm": str(work / "llm")}, "mwer": acllm}
    data = {"data": {"train": [str(work / "corpus" / "shards")]}}
    if stage == "lm_pretrain":
        data = {"text": [str(work / "corpus" / "text.txt")]}
    values = {**data, "inputs": inputs.get(stage, {}), **values}
    file, mine = work / f"{name}.yaml", work / f"{name}.{os.getpid()}.yaml"
    mine.write_text(yaml.safe_dump(values))
    mine.replace(file)  # ranks write the same at once
    stage_class, config = load_stage_config(stage, str(file), overrides=[f"run_dir={work / name}"])
    return stage_class, config.config


def predict(name: str, work: Path) -> dict:
    """Return the planned peak by part, in bytes."""
    from seedling.launch.plan import plan_memory

    stage, cfg = loaded(name, work)
    memory = plan_memory(stage(), cfg, ranks=RUNS[name][1])
    return memory._asdict() | {"total": memory.total}


def measure(name: str, work: Path) -> dict:
    """Train, and return by how many bytes this rank's memory grew, resident and of tensors."""
    from seedling.stages.runtime.allocations import Allocations
    from seedling.stages.runtime.meters import reset_peak_memory
    from seedling.stages.runtime.trainer import Trainer
    from seedling.stages.runtime.world import init_world, leave_world

    stage, cfg = loaded(name, work)
    world = init_world()
    warm_up(work, name)
    run_dir = work / name
    run_dir.mkdir(exist_ok=True)
    reset_peak_memory()
    before = status("VmRSS")
    with Allocations() as memory:
        Trainer(stage(), cfg, run_dir=run_dir, world=world).fit()
    grown = status("VmHWM") - before
    leave_world()
    return {"tensors": memory.peak, "resident": grown}


def warm_up(work: Path, name: str) -> None:
    """Train a tiny encoder in the same way, so that what libraries load on first use is not taken for the model's."""
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from seedling.stages.runtime.trainer import Trainer
    from seedling.stages.runtime.world import init_world

    stage, cfg = loaded("pretrain_zero0", work)
    encoder = replace(cfg.encoder, dim=32, num_layers=1, num_heads=2, subsampling_channels=8)
    train = replace(loaded(name, work)[1].train, lr=SSL_LR)
    cfg = replace(cfg, encoder=encoder, train=train, run_dir=str(work / f"{name}_warm"))
    (work / f"{name}_warm").mkdir(exist_ok=True)
    Trainer(stage(), cfg, run_dir=work / f"{name}_warm", world=init_world()).fit()
    gc.collect()


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run_ranks(work: Path, name: str) -> list[dict]:
    """Run this file on the ranks of a run, in fresh processes, and return what each found."""
    from seedling.stages.runtime.rendezvous import free_port

    ranks, port = RUNS[name][1], free_port()
    logs = [work / f"{name}.{rank}.log" for rank in range(ranks)]
    children = []
    for rank, log in enumerate(logs):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **ENVIRONMENT, **{key: str(value) for key, value in place.items()}}
        command = [sys.executable, __file__, "--child", str(work), name]
        with log.open("w") as out:
            children.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    for child, log in zip(children, logs):
        if child.wait():
            raise SystemExit(f"{name} failed:\n{log.read_text()[-3000:]}")
    return [json.loads(log.read_text().rpartition("FOUND ")[2].splitlines()[0]) for log in logs]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print("\nFOUND", json.dumps(measure(sys.argv[3], Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(os.environ.get("PLAN_MEMORY_WORK", folder))
        if not (work / "corpus").exists():
            make_corpus(work / "corpus")
            make_llm(work / "llm")
            make_acllm(work)
        report(work, sys.argv[1:] or list(RUNS))


def make_acllm(work: Path) -> None:
    """Write the recogniser that mwer goes on from, untrained."""
    import torch

    from seedling.stages.runtime.artifacts import ArtifactWriter, load_inputs

    stage, cfg = loaded("sft_zero1_bf16", work)
    cfg.train.precision = "fp32"
    torch.manual_seed(0)
    stage = stage()
    model = stage.build(cfg, load_inputs(stage.consumes, cfg.inputs, stage="sft"))
    writer = ArtifactWriter(work / "acllm" / "artifact", kind="acllm", stage="sft").start()
    stage.export(model, writer)
    writer.finish()


def report(work: Path, names: list[str]) -> None:
    """Measure each run and print a row of it; MB of the rank that took most."""
    print(f"{'run':<22}{'ranks':>6}{'planned':>9}{'moment':>16}{'tensors':>9}{'resident':>10}{'plan / resident':>17}")
    worst = 0.0
    for name in names:
        planned = predict(name, work)
        found = max(run_ranks(work, name), key=lambda rank: rank["resident"])
        tensors, grown = found["tensors"], found["resident"]
        ratio = planned["total"] / grown
        worst = max(worst, abs(ratio - 1))
        row = f"{name:<22}{RUNS[name][1]:>6}{planned['total'] / 1e6:>9.0f}{planned['moment']:>16}"
        print(f"{row}{tensors / 1e6:>9.0f}{grown / 1e6:>10.0f}{ratio:>17.3f}", flush=True)
        parts = {key: round(value / 1e6) for key, value in planned.items() if isinstance(value, int) and key != "total"}
        print(f"    {parts}", flush=True)
    print(f"furthest off: {worst:.1%}; bound {BOUND:.0%}")


if __name__ == "__main__":
    main()
