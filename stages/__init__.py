"""Floor 4: one file per stage. The names here are those of `seedling run STAGE`; nothing is imported until it is asked for."""

STAGES: dict[str, str] = {
    "lm_pretrain": "seedling.stages.lm_pretrain:LMPretrain",
    "sft": "seedling.stages.sft:SFT",
    "evaluate": "seedling.stages.evaluate:Evaluate",
}
