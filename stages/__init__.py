"""Floor 5: one file per stage. The names are those of `seedling run STAGE`; a stage is imported when asked for."""

STAGES: dict[str, str] = {
    "lm_pretrain": "seedling.stages.lm_pretrain:LMPretrain",
    "encoder_pretrain": "seedling.stages.encoder_pretrain:EncoderPretrain",
    "layer_probe": "seedling.stages.layer_probe:LayerProbe",
    "cluster_labels": "seedling.stages.cluster_labels:ClusterLabels",
    "sft": "seedling.stages.sft:SFT",
    "context_sft": "seedling.stages.context_sft:ContextSFT",
    "mwer": "seedling.stages.mwer:MWER",
    "quantize": "seedling.stages.quantize:Quantize",
    "tune_decoding": "seedling.stages.tune_decoding:TuneDecoding",
    "evaluate": "seedling.stages.evaluate:Evaluate",
}
