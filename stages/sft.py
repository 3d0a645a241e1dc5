"""sft: supervised fine-tuning of the audio-conditioned LLM on pairs of speech and transcript.

Starts from an LLM folder and a fresh or a pretrained encoder (`inputs.encoder`), or goes on from a finished recogniser
(`inputs.acllm`). What it shares with context_sft, the loss above all, is in recogniser/training.py.
"""

from dataclasses import asdict, dataclass

from torch import nn

from ..data.loader import AudioBatch
from ..model.audio_llm import AudioLLM
from ..model.conformer import ConformerEncoder
from ..model.ctc import text_bytes
from ..model.features import Fbank
from ..model.llm import load_llm, load_tokenizer
from ..model.speech_encoder import SpeechEncoder, load_speech_encoder
from .recogniser.training import RecogniserConfig, RecogniserTraining, llm_dtype
from .runtime.artifacts import Artifact, ArtifactSpec
from .runtime.stage import StepOutput, on_meta


@dataclass(kw_only=True)
class SFTConfig(RecogniserConfig):
    # Steps at the start that train the encoder by CTC alone. There is nothing yet for an LLM to listen to, and it would
    # cost a third of the time of a small encoder's step.
    ctc_steps: int = 0
    cmvn_batches: int = 20  # micro-batches of training audio that the features' mean and variance are taken from

    def __post_init__(self):
        super().__post_init__()
        if self.ctc_steps and not self.ctc_weight:
            raise ValueError(
                f"ctc_steps is {self.ctc_steps} and ctc_weight is 0: nothing would learn; set ctc_weight=0.5"
            )


class SFT(RecogniserTraining):
    """Cross-entropy of the transcript given [instruction | speech], plus an optional CTC loss on the encoder."""

    consumes = {
        "llm": ArtifactSpec("llm", required=False, foreign=True),
        "encoder": ArtifactSpec("speech_encoder", required=False),
        "acllm": ArtifactSpec("acllm", required=False),
    }
    Config = SFTConfig
    cfg: SFTConfig

    def build(self, cfg: SFTConfig, inputs: dict[str, Artifact]) -> AudioLLM:
        if "acllm" not in inputs:
            return self.ready(cfg, self._fresh(cfg, inputs))
        others = sorted(set(inputs) - {"acllm"})
        if others:
            raise ValueError(f"inputs.acllm already holds an encoder and an LLM; leave out inputs.{others[0]}")
        return self.ready(cfg, self.go_on(cfg, inputs["acllm"]))

    def _fresh(self, cfg: SFTConfig, inputs: dict[str, Artifact]) -> AudioLLM:
        if "llm" not in inputs:
            raise ValueError(
                "sft needs an LLM: set inputs.llm to a Hugging Face folder, or inputs.acllm to go on from one"
            )
        speech = self._speech_encoder(cfg, inputs.get("encoder"))
        model = AudioLLM.assemble(
            encoder=speech.encoder,
            llm=load_llm(inputs["llm"].path, dtype=llm_dtype(cfg), meta=on_meta()),
            tokenizer=load_tokenizer(inputs["llm"].path),
            fbank=speech.fbank,
            converter=cfg.converter,
            specaugment=cfg.specaugment,
            prompts=cfg.prompts,
            ctc=cfg.ctc_weight > 0,
        )
        model.config.decode = asdict(cfg.decode)
        return model

    def _speech_encoder(self, cfg: SFTConfig, pretrained: Artifact | None) -> SpeechEncoder:
        if pretrained:
            speech = load_speech_encoder(pretrained.path, features=cfg.features, encoder=cfg.encoder)
            self.sample_rate = speech.fbank.cfg.sample_rate
            return speech
        self.sample_rate = cfg.features.sample_rate
        fbank = Fbank(cfg.features)
        if not on_meta():
            some_audio = self.batches(cfg, "train").first(cfg.cmvn_batches)
            fbank.estimate_cmvn((batch.waveforms_BN, batch.lengths_B) for batch in some_audio)
        return SpeechEncoder.assemble(fbank=fbank, encoder=ConformerEncoder(cfg.encoder))

    def loss(self, model: nn.Module, batch: AudioBatch) -> StepOutput:
        if batch.index >= self.cfg.ctc_steps * self.cfg.train.micro_batches:
            return super().loss(model, batch)
        ctc = model.ctc_loss(batch.waveforms_BN, batch.lengths_B, [text_bytes(text) for text in batch.texts])
        return StepOutput(self.cfg.ctc_weight * ctc.loss_sum, self.ctc_metrics(ctc, batch))
