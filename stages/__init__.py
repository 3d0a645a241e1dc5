"""Floor 4: one file per stage. The names are those of `seedling run STAGE`; a stage is imported when asked for."""

STAGES: dict[str, str] = {
    "lm_pretrain": "seedling.stages.lm_pretrain:LMPretrain",
    "sft": "seedling.stages.sft:SFT",
    "evaluate": "seedling.stages.evaluate:Evaluate",
}
