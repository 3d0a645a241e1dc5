"""The audio-conditioned LLM: speech embeddings in the prompt of a causal LM, which writes the transcript.

Training pads on the right: padding then lies behind every real position, where a causal LM cannot look, so that
attention covers exactly the valid prompt without a mask and may use the fastest kernel. The loss is taken on transcript
and end token only, and the vocabulary head runs on those positions alone (target_losses.py).

The LLM may be stored in bfloat16 beside a float32 encoder; speech embeddings are cast to the LLM's type. Parameters are
named encoder.*, converter.*, ctc_head.* and llm.* (adapters within it contain `lora_`): stages pick by these names what
they train. An LLM without any trained parameter runs in evaluation mode, so its dropout is off.

Shape letters: B utterances, N samples or target positions, T encoder frames or LLM positions, D encoder width, S speech
positions, L LLM width, V vocabulary.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..kernels.head_kl import Head
from .assembled import AssembledModel
from .audio_llm_config import AudioLLMConfig
from .augment import SpecAugment, SpecAugmentConfig
from .conformer import ConformerConfig, ConformerEncoder
from .context_search import ContextPrompt, ContextScorer
from .converter import Converter, ConverterConfig
from .ctc import CTCHead, CTCLoss, bytes_text, ctc_loss_sum, greedy_decode
from .ctc_prefix import CTCPrefixes, TokenBytes
from .ctc_scorer import CTCGains, CTCScorer
from .decoding import DecodeConfig, Hypothesis, StepScorer, decode
from .features import Fbank, FeatureConfig
from .llm import fresh_llm, has_lora, merge_lora, token_embeddings
from .llm_scorer import llm_scorer
from .processor import AudioLLMProcessor
from .prompt import PromptConfig, PromptTokens, answer_targets, lay_out, place_speech
from .sampling import sample
from .speech_encoder import speech_encoder_facts
from .static_step import CudaGraphs, StaticScorer, StaticSteps, takes_graphs
from .target_losses import target_losses


class SpeechOutput(NamedTuple):
    """Speech as the LLM sees it, the encoder's output that it came from, and how long the waveforms were."""

    speech_BSL: Tensor
    lengths_B: Tensor
    encoder_BTD: Tensor
    encoder_lengths_B: Tensor
    samples_B: Tensor

    def detach(self) -> "SpeechOutput":
        """Return the same without its graph: what was encoded to be learnt from can be searched as well."""
        return SpeechOutput(*(tensor.detach() for tensor in self))

    def of(self, rows_R: Tensor) -> "SpeechOutput":
        """Return the speech of these utterances, in this order; one may be taken several times."""
        return SpeechOutput(*(value[rows_R] for value in self))


class AudioLLMOutput(NamedTuple):
    """Sums and counts over the batch; the trainer alone divides. Target positions run utterance by utterance."""

    loss_sum: Tensor  # cross-entropy of transcript and end tokens, nats, float32
    count: int  # target tokens, end tokens included
    nll_N: Tensor  # -log p of each target token
    rows_N: Tensor  # the utterance that a target belongs to
    correct: Tensor  # targets that have the highest logit
    ctc: CTCLoss | None
    logits_NV: Tensor | None
    speech: SpeechOutput
    product: Head | None = None  # what logits are made of


class AudioLLM(AssembledModel):
    """Fbank, SpecAugment, encoder, converter, LLM, and optionally a CTC head on the encoder."""

    config_class = AudioLLMConfig
    main_input_name = "waveforms"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    fbank: Fbank
    encoder: ConformerEncoder
    llm: PreTrainedModel
    converter: Converter
    ctc_head: CTCHead | None

    def __init__(self, config: AudioLLMConfig, *, parts: dict[str, Any] | None = None):
        """Build every part from the config, but for those given in `parts` under their attribute's name."""
        super().__init__(config)
        parts = parts or {}
        self.fbank = parts.get("fbank") or Fbank(FeatureConfig(**config.feature_config))
        self.specaugment = SpecAugment(SpecAugmentConfig(**config.specaugment_config))
        self.encoder = parts.get("encoder") or ConformerEncoder(ConformerConfig(**config.audio_config))
        self.llm = parts.get("llm") or fresh_llm(config.text_config)
        encoder_dim, llm_dim = self.encoder.cfg.dim, token_embeddings(self.llm).embedding_dim
        self.converter = parts.get("converter") or Converter(
            ConverterConfig(**config.converter_config), encoder_dim=encoder_dim, llm_dim=llm_dim
        )
        self.ctc_head = parts.get("ctc_head")
        if self.ctc_head is None and config.ctc:
            self.ctc_head = CTCHead(encoder_dim)
        self.prompt_tokens = PromptTokens(**config.prompt_tokens)
        self._processor: AudioLLMProcessor | None = None
        self._token_bytes: TokenBytes | None = None  # made when joint decoding first needs it
        self._steps: StaticSteps | None = None  # made by record_steps
        if config.acoustic_dtype == "float32":
            # Or loading would round them to the LLM's type, of which the config says `dtype`.
            self._keep_in_fp32_modules_strict = {"fbank", "encoder", "converter", "ctc_head"}
        self.post_init()

    @classmethod
    def assemble(
        cls,
        *,
        encoder: ConformerEncoder,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        fbank: Fbank | None = None,
        converter: ConverterConfig | Converter | None = None,
        specaugment: SpecAugmentConfig | None = None,
        prompts: PromptConfig | None = None,
        ctc: bool = False,
    ) -> "AudioLLM":
        """Join trained or fresh parts. The modules are taken over as they are, not copied."""
        table = token_embeddings(llm)
        if len(tokenizer) > table.num_embeddings:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the LLM embeds {table.num_embeddings}: "
                "they are not from the same model folder"
            )
        fbank, prompts = fbank or Fbank(FeatureConfig()), _with_room(prompts or PromptConfig(), llm.config)
        made: dict[str, Any] = {"fbank": fbank, "encoder": encoder, "llm": llm}
        converter = converter or ConverterConfig()
        if isinstance(converter, Converter):
            made["converter"], converter = converter, ConverterConfig(stride=converter.stride)
        config = AudioLLMConfig(
            text_config=llm.config,
            feature_config=asdict(fbank.cfg),
            audio_config=asdict(encoder.cfg),
            converter_config=asdict(converter),
            specaugment_config=asdict(specaugment or SpecAugmentConfig()),
            prompts=asdict(prompts),
            prompt_tokens=asdict(PromptTokens.of(prompts, tokenizer=tokenizer)),
            ctc=ctc,
        )
        model = cls(config, parts=made)
        if "converter" not in made:
            model.converter.match_scale(table.weight)
        model.processor = AudioLLMProcessor(tokenizer, sample_rate=fbank.cfg.sample_rate, prompts=prompts)
        return model

    @property
    def processor(self) -> AudioLLMProcessor:
        """Tokenizer, sample rate and prompts; ValueError where the model was built from a bare config."""
        if self._processor is None:
            raise ValueError("this AudioLLM has no processor: use from_pretrained or assemble, or set model.processor")
        return self._processor

    @processor.setter
    def processor(self, processor: AudioLLMProcessor) -> None:
        self._processor = processor

    def set_prompts(self, prompts: PromptConfig) -> None:
        """Use other texts around the speech from now on: in training, decoding and what is saved."""
        processor = self.processor
        processor.prompts = _with_room(prompts, self.llm.config)
        self.prompt_tokens = PromptTokens.of(processor.prompts, tokenizer=processor.tokenizer)
        self.config.prompts, self.config.prompt_tokens = asdict(processor.prompts), asdict(self.prompt_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """The LLM's type: nearly all the weights, and what `save_pretrained` notes as the model's."""
        return self.llm.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.llm.get_output_embeddings()

    def train(self, mode: bool = True) -> "AudioLLM":
        super().train(mode)
        self.llm.train(mode and self._llm_learns())
        return self

    @property
    def varies_in_training(self) -> bool:
        """Whether speech is encoded in another way in training than in decoding: masks, dropout, drawn chunks."""
        return self.specaugment.cfg.masks or self.encoder.cfg.varies_in_training

    def _llm_learns(self) -> bool:
        return any(p.requires_grad for p in self.llm.parameters())

    # ---- from sound to prompt

    def encode_speech(self, waveforms_BN: Tensor, lengths_B: Tensor) -> SpeechOutput:
        """Return speech embeddings in the LLM's type, for waveforms in [-1, 1] and their lengths in samples."""
        encoder_BTD, encoder_lengths_B = self._encode(waveforms_BN, lengths_B)
        speech_BSL, speech_lengths_B = self.converter(encoder_BTD, encoder_lengths_B)
        return SpeechOutput(speech_BSL.to(self.llm.dtype), speech_lengths_B, encoder_BTD, encoder_lengths_B, lengths_B)

    def _encode(self, waveforms_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return encoder_BTD and its lengths."""
        features_BTF, frames_B = self.fbank(waveforms_BN, lengths_B)
        features_BTF = self.specaugment(features_BTF, frames_B)
        acoustic_dtype = next(self.encoder.parameters()).dtype
        return self.encoder(features_BTF.to(acoustic_dtype), frames_B)

    def build_prompt(
        self,
        speech: SpeechOutput,
        contexts_ids: list[list[int] | None] | None = None,
        languages: list[str | None] | None = None,
    ) -> list[Tensor]:
        """Return each utterance's prefix_PL, the embeddings of [instruction | context | speech], for decoding."""
        empty = [[] for _ in speech.lengths_B]
        embeddings_BTL, lengths = self.embed(speech, contexts_ids, languages, transcripts_ids=empty)
        return [prefix_TL[:length] for prefix_TL, length in zip(embeddings_BTL, lengths)]

    def embed(
        self,
        speech: SpeechOutput,
        contexts_ids: list[list[int] | None] | None = None,
        languages: list[str | None] | None = None,
        *,
        transcripts_ids: list[list[int]],
    ) -> tuple[Tensor, list[int]]:
        """Return embeddings_BTL of [prompt | transcript], padded on the right, and the lengths."""
        if self.training and self.llm.training != self._llm_learns():
            self.train()  # what is trained was chosen after the mode was
        tokens, speech_lengths = self.prompt_tokens, speech.lengths_B.tolist()
        contexts = contexts_ids or [None] * len(speech_lengths)
        languages = languages or [None] * len(speech_lengths)
        if not len(contexts) == len(languages) == len(transcripts_ids) == len(speech_lengths):
            raise ValueError(
                f"{len(speech_lengths)} utterances need as many transcripts, contexts and languages, "
                f"found {len(transcripts_ids)}, {len(contexts)} and {len(languages)}"
            )
        layout = lay_out(
            [tokens.before_speech(context, language) for context, language in zip(contexts, languages)],
            speech_lengths,
            [tokens.after + transcript for transcript in transcripts_ids],
            device=speech.speech_BSL.device,
        )
        tokens_BTL = self.llm.get_input_embeddings()(layout.token_ids_BT)
        embeddings_BTL = place_speech(
            tokens_BTL, speech.speech_BSL, starts_B=layout.speech_starts_B, speech_lengths_B=speech.lengths_B
        )
        return embeddings_BTL, layout.lengths

    # ---- training

    def forward(
        self,
        waveforms: Tensor,
        lengths: Tensor,
        transcripts_ids: list[list[int]],
        contexts_ids: list[list[int] | None] | None = None,
        *,
        languages: list[str | None] | None = None,
        ctc_targets: list[list[int]] | None = None,
        return_logits: bool = False,
        return_product: bool = False,
    ) -> AudioLLMOutput:
        """Return the losses of waveforms_BN, lengths_B in samples, and token ids without start or end tokens.

        `languages` are tags of `prompts.languages`, which the instruction then names. `ctc_targets` (`ctc.text_bytes`
        of each transcript) adds the loss of the CTC head. `return_product` gives logits as the product that they are,
        which is small, and as `logits_NV` where they are none (target_losses.py).
        """
        speech = self.encode_speech(waveforms, lengths)
        embeddings_BTL, prompt_lengths = self.embed(speech, contexts_ids, languages, transcripts_ids=transcripts_ids)
        device, end = embeddings_BTL.device, self.prompt_tokens.end
        targets = answer_targets(prompt_lengths, transcripts_ids, end=end, device=device)
        asked = {"return_logits": return_logits, "return_product": return_product}
        losses = target_losses(self.llm, embeddings_BTL, targets, **asked)
        ctc = None
        if ctc_targets is not None:
            ctc = self._ctc_loss(speech.encoder_BTD, speech.encoder_lengths_B, ctc_targets)
        return AudioLLMOutput(
            loss_sum=losses.nll_N.sum(),
            count=len(targets.tokens_N),
            nll_N=losses.nll_N,
            rows_N=targets.rows_N,
            correct=losses.correct_N.sum(),
            ctc=ctc,
            logits_NV=losses.logits_NV,
            speech=speech,
            product=losses.product,
        )

    def ctc_loss(self, waveforms_BN: Tensor, lengths_B: Tensor, targets: list[list[int]]) -> CTCLoss:
        """Return the CTC head's loss alone: neither converter nor LLM runs."""
        return self._ctc_loss(*self._encode(waveforms_BN, lengths_B), targets)

    def speech_ctc_loss(self, speech: SpeechOutput, targets: list[list[int]]) -> CTCLoss:
        """Return the CTC head's loss on speech that has been encoded."""
        return self._ctc_loss(speech.encoder_BTD, speech.encoder_lengths_B, targets)

    def _ctc_loss(self, encoder_BTD: Tensor, lengths_B: Tensor, targets: list[list[int]]) -> CTCLoss:
        if self.ctc_head is None:
            raise ValueError("the model has no CTC head; assemble it with ctc=True, or pass no ctc_targets")
        return ctc_loss_sum(self.ctc_head(encoder_BTD), lengths_B, targets)

    @torch.no_grad()
    def ctc_texts(self, waveforms_BN: Tensor, lengths_B: Tensor) -> list[str]:
        """Return what the CTC head alone hears on its best path: the encoder's own ear, without the LLM."""
        assert self.ctc_head is not None, "the model has no CTC head"
        encoder_BTD, encoder_lengths_B = self._encode(waveforms_BN, lengths_B)
        return [bytes_text(ids) for ids in greedy_decode(self.ctc_head(encoder_BTD), encoder_lengths_B)]

    # ---- decoding

    @torch.no_grad()
    def transcribe_ids(
        self,
        waveforms: Tensor,
        lengths: Tensor,
        *,
        contexts_ids: list[list[int] | None] | None = None,
        languages: list[str | None] | None = None,
        config: DecodeConfig | None = None,
    ) -> list[list[Hypothesis]]:
        """Return the N-best hypotheses of each utterance, best first; `config` None: by the model's own settings."""
        if self.training:
            raise ValueError("the model is in training mode, with dropout and masks; call model.eval() before decoding")
        speech = self.encode_speech(waveforms, lengths)
        return self.search(speech, contexts_ids=contexts_ids, languages=languages, config=config)

    @torch.no_grad()
    def search(
        self,
        speech: SpeechOutput,
        *,
        contexts_ids: list[list[int] | None] | None = None,
        languages: list[str | None] | None = None,
        config: DecodeConfig | None = None,
    ) -> list[list[Hypothesis]]:
        """Return what `transcribe_ids` does, for speech that has been encoded."""
        config = config or self.decode_config
        joint = config.context_search == "joint" and any(contexts_ids or [])
        prefixes = self.build_prompt(speech, contexts_ids, languages)
        if joint:
            assert contexts_ids is not None
            plain = self.build_prompt(speech, languages=languages)
            prefixes = [ContextPrompt(p, c if ids else None) for p, c, ids in zip(plain, prefixes, contexts_ids)]
        llm, ctc = self._llm_scorer(), self._ctc_gains(speech, config) if config.ctc_weight else None
        scorer: StepScorer = llm if ctc is None else CTCScorer(llm, ctc)
        if joint:
            scorer = ContextScorer(llm, config=config, ctc=ctc)
        limits = self._limits(speech, config)
        return decode(scorer, prefixes, limits=limits, end=self.prompt_tokens.end, config=config)

    @torch.no_grad()
    def sample(
        self,
        speech: SpeechOutput,
        *,
        num: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        contexts_ids: list[list[int] | None] | None = None,
        languages: list[str | None] | None = None,
    ) -> list[list[Hypothesis]]:
        """Return `num` samples of the LLM's distribution for each utterance, in the order drawn (model/sampling.py)."""
        return sample(
            self._llm_scorer(),
            self.build_prompt(speech, contexts_ids, languages),
            limits=self._limits(speech, self.decode_config),
            end=self.prompt_tokens.end,
            num=num,
            temperature=temperature,
            top_p=top_p,
            generator=generator,
        )

    def record_steps(self) -> bool:
        """Let a GPU replay the LLM's decoding steps from here on (model/static_step.py); return whether it can.

        For a recogniser that serves: the buffers stay allocated between searches.
        """
        self._steps = StaticSteps(self.llm, record=CudaGraphs(self.llm.device)) if takes_graphs(self.llm) else None
        return self._steps is not None

    def _llm_scorer(self) -> StepScorer:
        return StaticScorer(self._steps) if self._steps and not self.llm.training else llm_scorer(self.llm)

    def _limits(self, speech: SpeechOutput, config: DecodeConfig) -> list[int]:
        """Return the most tokens that each utterance may have."""
        sample_rate = self.fbank.cfg.sample_rate
        return [config.limit(seconds=samples / sample_rate) for samples in speech.samples_B.tolist()]

    @property
    def decode_config(self) -> DecodeConfig:
        """How the model transcribes where nothing else is asked for."""
        return DecodeConfig(**self.config.decode)

    def _ctc_gains(self, speech: SpeechOutput, config: DecodeConfig) -> CTCGains:
        if self.ctc_head is None:
            raise ValueError(
                f"decode.ctc_weight is {config.ctc_weight} and the model has no CTC head; set it to 0, or train with "
                "ctc_weight above 0"
            )
        if self._token_bytes is None or self._token_bytes.bytes_VY.device != self.device:
            vocabulary = self.llm.get_input_embeddings().num_embeddings
            self._token_bytes = TokenBytes(self.processor.tokenizer, vocab_size=vocabulary, device=self.device)
        return CTCGains(
            CTCPrefixes(self.ctc_head(speech.encoder_BTD), speech.encoder_lengths_B),
            tokens=self._token_bytes,
            end=self.prompt_tokens.end,
            weight=config.ctc_weight,
            candidates=config.ctc_candidates,
        )

    def generate(
        self,
        waveforms: Tensor,
        lengths: Tensor,
        *,
        contexts_ids: list[list[int] | None] | None = None,
        languages: list[str | None] | None = None,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        max_new_tokens: int = DecodeConfig.max_new_tokens,
        length_penalty: float = DecodeConfig.length_penalty,
    ) -> Tensor:
        """Return token ids [B * num_return_sequences, T], filled up with end tokens, for `processor.batch_decode`.

        Same meaning of the arguments as in transformers; `transcribe_ids` has scores and every other setting.
        """
        config = DecodeConfig(
            beam_size=num_beams,
            nbest=num_return_sequences,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
        )
        nbest = self.transcribe_ids(waveforms, lengths, contexts_ids=contexts_ids, languages=languages, config=config)
        rows = [torch.tensor(h.ids + [self.prompt_tokens.end] * h.complete) for nbests in nbest for h in nbests]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.prompt_tokens.end)
        return ids.long().to(waveforms.device)

    # ---- files

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write everything that loading needs: weights (adapters merged), config, tokenizer, generation settings."""
        state = kwargs.pop("state_dict", None)
        if has_lora(self):
            state = merge_lora(self, self.state_dict() if state is None else state)
        self.config.acoustic_dtype = str(next(self.encoder.parameters()).dtype).removeprefix("torch.")
        super().save_pretrained(save_directory, state_dict=state, **kwargs)
        generation = getattr(self.llm, "generation_config", None)
        (generation or GenerationConfig.from_model_config(self.llm.config)).save_pretrained(save_directory)
        if self._processor is not None:
            self._processor.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, path: str | Path, *args, **kwargs) -> "AudioLLM":
        """Load a folder that `save_pretrained` wrote, with its processor."""
        report = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        if (Path(path) / "generation_config.json").is_file():
            model.llm.generation_config = GenerationConfig.from_pretrained(path)
        if (Path(path) / "processor_config.json").is_file():
            model.processor = AudioLLMProcessor.from_pretrained(path)
            # A folder from before contexts had a limit does not say what its LLM takes.
            model.processor.prompts = _with_room(model.processor.prompts, model.llm.config)
        return (model, info) if report else model


def _with_room(prompts: PromptConfig, llm_config: Any) -> PromptConfig:
    """Return the prompts with a context limit that leaves at least half of the LLM's positions to everything else."""
    positions = getattr(llm_config, "max_position_embeddings", None)
    return replace(prompts, context_tokens=min(prompts.context_tokens, positions // 2)) if positions else prompts


def acllm_facts(model: AudioLLM) -> dict[str, str | float]:
    """Return what must agree between whoever wrote a recogniser and whoever reads it; goes into its manifest."""
    facts = speech_encoder_facts(model)
    vocabulary = json.dumps(sorted(model.processor.tokenizer.get_vocab().items()), ensure_ascii=False)
    prompts = json.dumps([model.config.prompts, model.config.prompt_tokens], sort_keys=True, ensure_ascii=False)
    return facts | {
        "llm_positions_per_second": round(facts["encoder_frames_per_second"] / model.converter.stride, 6),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
    }
