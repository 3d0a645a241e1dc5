"""DeepSpeed's JSON, written from TrainConfig. `train.deepspeed_extra` merges last and touches no key written here."""

from __future__ import annotations

from .train_config import TrainConfig

# DeepSpeed's own default, allocated whole: 2 GB in fp32, whatever the model's size. A small model gets a small one.
MAX_BUCKET = 500_000_000


def deepspeed_config(cfg: TrainConfig, *, accumulation_steps: int, world_size: int, trainable_numel: int) -> dict:
    """Return the config of one run. Sizes are in micro-batches: what a micro-batch holds is the plan's business."""
    generated = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": accumulation_steps * world_size,
        # At stage 0 the engine clips, because DeepSpeed clips there without saying what the norm was.
        "gradient_clipping": cfg.grad_clip if cfg.effective_zero_stage else 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": cfg.effective_zero_stage,
            "reduce_bucket_size": max(1, min(MAX_BUCKET, trainable_numel)),
        },
        # A client optimizer (torch AdamW) with optimizer offload is the user's explicit wish, not an oversight.
        "zero_force_ds_cpu_optimizer": False,
    }
    if cfg.precision == "bf16":
        generated["bf16"] = {"enabled": True, "check_grad_overflow": True}
        # bf16 sums lose small gradients: eight micro-batches already drop the last bits of each.
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return merge_extra(generated, cfg.deepspeed_extra)


def merge_extra(generated: dict, extra: dict, *, path: str = "") -> dict:
    """Return `generated` with `extra` added, section by section; ValueError for a key that seedling writes itself."""
    merged = dict(generated)
    for key, value in extra.items():
        name = f"{path}{key}"
        if key not in generated:
            merged[key] = value
        elif isinstance(generated[key], dict) and isinstance(value, dict):
            merged[key] = merge_extra(generated[key], value, path=f"{name}.")
        else:
            raise ValueError(
                f"train.deepspeed_extra.{name}={value!r}: this key is written from train.* ({generated[key]!r}); "
                "set the train.* field instead"
            )
    return merged
