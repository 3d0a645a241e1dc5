"""The tables of docs/scaling.md: a 2B encoder, alone and under a 13B mixture of experts, planned for 256 H200 and more.

    .venv/bin/python benchmarks/plan_scaling.py [--mfu 0.4]

Nothing is trained and no weight exists. The packaged configs pretrain_2b and sft_2b are planned as they are, but that a
step has a micro-batch for each GPU. The corpus is one shard of four silent recordings of 12 to 30 s, whose index names
each 2,000 times; the LLM is a folder with a config and a tokenizer.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from seedling.data.index import index_path, list_shards
from seedling.data.prepare import prepare
from seedling.data.tokenizer import train_bpe
from seedling.launch.plan import RunPlan, pace, plan_run, setting
from seedling.launch.stage_lookup import load_stage_config
from seedling.stages.runtime.gpus import GPUS

GB = 1e9
GPU = GPUS["h200"]
PLANNED_RANKS = 256
WEAK_RANKS = (1, 8, 64, 256, 512, 1024)
SECONDS = (12, 18, 24, 30)
COPIES = 2000
# 12.1B in 80 experts of 32 layers, of which a token meets 8, 0.3B of attention, 0.6B of embeddings and head.
MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 80,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def make_corpus(folder: Path) -> Path:
    """Write four recordings as a shard, and an index that names each of them COPIES times."""
    folder.mkdir()
    lines = []
    for seconds in SECONDS:
        file = folder / f"{seconds}.wav"
        soundfile.write(file, np.zeros(seconds * 16000, np.float32), 16000)
        text = "the quick brown fox " * (seconds * 14 // 20)
        lines.append({"audio_filepath": file.name, "duration": seconds, "text": text.strip()})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(folder / "manifest.jsonl", folder / "shards", shard_seconds=1000)
    (shard,) = (folder / "shards").rglob("*.tar")
    rows = np.load(index_path(shard))
    np.save(index_path(shard), np.repeat(rows, COPIES))
    list_shards(folder / "shards")
    return folder / "shards"


def make_llm(folder: Path) -> Path:
    """Write the config of the LLM and a tokenizer, of which the LLM embeds all tokens and many more."""
    train_bpe(["the quick brown fox Transcribe the speech"], vocab_size=340).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MOE))
    return folder


def planned(stage: str, config: str, *overrides: str) -> RunPlan:
    stage_class, loaded = load_stage_config(stage, config, overrides=list(overrides))
    return plan_run(stage_class(), loaded.config)


def memory_table(run: RunPlan) -> list[str]:
    """Return rows of the parts of a rank's memory, for each ZeRO stage."""
    parts = ("weights", "masters", "gradients", "moments", "buffers", "activations")
    lines = ["| ZeRO | " + " | ".join(parts) + " | total | peak in | fits 141 GB |", "|---" * 10 + "|"]
    for zero_stage in (1, 2, 3):
        at = setting(run, zero_stage=zero_stage, ranks=PLANNED_RANKS)
        cells = [f"{getattr(at.memory, part) / GB:.1f}" for part in parts] + [f"{at.memory.total / GB:.1f}"]
        lines.append(f"| {zero_stage} | {' | '.join(cells)} | {at.memory.moment} | {'yes' if at.fits(GPU) else 'no'} |")
    return lines


def scaling_table(run: RunPlan, *, mfu: float) -> list[str]:
    """Return rows of how a step grows when each rank has one micro-batch in it: ZeRO 1 and 2 then send the same."""
    cells = " | ".join(f"{name}: sent, GB | s | efficiency" for name in ("ZeRO 1 and 2", "ZeRO 3"))
    lines = [f"| GPUs | arithmetic, s | {cells} |", "|---" * 8 + "|"]
    for R in WEAK_RANKS:
        one_each = run.with_train(global_batch_seconds=R * run.train.micro_batch_seconds)
        row = []
        for zero_stage in (2, 3):
            at = setting(one_each, zero_stage=zero_stage, ranks=R)
            speed = pace(run, at, GPU, mfu=mfu)
            least, most = speed.efficiency
            ends = f"{least:.0%}" if zero_stage < 3 else f"{least:.0%} to {most:.0%}"
            row += [f"{at.traffic.sent / GB:.1f}", f"{speed.between:.2g}", ends]
        lines.append(f"| {R} | {speed.arithmetic:.3g} | {' | '.join(row)} |")
    return lines


def describe(title: str, run: RunPlan, *, mfu: float) -> list[str]:
    flops, sizes = run.trace.flops, run.sizes
    return [
        f"\n## {title}\n",
        f"{sizes.trainable / 1e9:.2f} B elements learn, {sizes.frozen / 1e9:.2f} B are frozen. Largest micro-batch: "
        f"{run.largest}. Forward {flops.forward / 1e12:.1f} TFLOP, backward {flops.backward / 1e12:.1f}, recomputed "
        f"{flops.recomputed / 1e12:.1f}; {run.trace.saved / GB:.2f} GB lie between the passes, at most "
        f"{run.trace.activations / GB:.2f} GB of activations. A step of {run.train.micro_batches} micro-batches: "
        f"{run.step_flops / 1e15:.1f} PFLOP.\n",
        f"On {PLANNED_RANKS} GPUs, GB of a rank at its peak:\n",
        *memory_table(run),
        f"\nOne micro-batch a GPU and step, at {mfu:.0%} of the peak:\n",
        *scaling_table(run, mfu=mfu),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mfu", type=float, default=0.4)
    mfu = parser.parse_args().mfu
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        corpus, llm = make_corpus(work / "corpus"), make_llm(work / "llm")
        for title, stage, config, more in (
            ("Masked prediction, 2B encoder", "encoder_pretrain", "pretrain_2b", []),
            ("Fine-tuning, 2B encoder under a frozen 13B mixture of experts", "sft", "sft_2b", [f"inputs.llm={llm}"]),
        ):
            given = [f"run_dir={work / stage}", f"data.train=[{corpus}]", *more]
            _, loaded = load_stage_config(stage, config, overrides=given)
            seconds = loaded.config.train.micro_batch_seconds
            given.append(f"train.global_batch_seconds={PLANNED_RANKS * seconds}")
            print("\n".join(describe(title, planned(stage, config, *given), mfu=mfu)), flush=True)


if __name__ == "__main__":
    main()
