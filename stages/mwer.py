"""mwer: trains a recogniser on the errors of its own hypotheses, of which cross-entropy knows nothing (Seed-ASR's RL).

For every utterance N hypotheses are searched or sampled by the weights as they are, judged on normalised text (WER, or
weighted WER, in which keywords cost more) and scored by the weights that learn. The expected risk falls:

    L = (1/N) sum_i Phat(y_i|x) (W(y_i, y*) - Wbar) + ce_weight (CE + ctc_weight CTC)         a mean over utterances

Phat is the softmax of log P(y_i|x) over the list, its gradient whole (reinforcement/objectives.py). `objective=grpo`
moves the probability of each sample by its advantage over its group instead. Triples with contexts among the data keep
the recall of names: error rate as the only aim, on pairs alone, is known to cost it.

The encoder runs once an utterance, forward and backward; hypotheses and reference are one token tree behind one prompt
(model/candidate_scoring.py). Who generates, this process or others, is reinforcement/generation.py's matter.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..data.batches import STAND_IN_KEY
from ..data.contexts.corpus import read_shard
from ..data.index import Corpus
from ..data.loader import AudioBatch
from ..model.audio_llm import AudioLLM, SpeechOutput
from ..model.augment import SpecAugmentConfig
from ..model.candidate_scoring import score_candidates
from ..model.conformer import ConformerConfig
from ..model.ctc import text_bytes
from ..model.decoding import Hypothesis
from .recogniser.contextual import ContextualConfig, ContextualTraining
from .recogniser.training import Prompts
from .reinforcement.candidates import NBest, NBestConfig, distinct
from .reinforcement.generation import (
    Generated,
    GenerationConfig,
    WholeModel,
    generate,
    require_workers_under_zero_3,
)
from .reinforcement.objectives import group_advantages, grpo_loss, mwer_loss, usable
from .reinforcement.rewards import RewardConfig, reward_of
from .reinforcement.risks import RiskConfig, Risks, rare_words
from .reinforcement.scored import ScoredLists, list_metrics, score_lists
from .reinforcement.workers import make_generation
from .runtime.artifacts import Artifact
from .runtime.feed import FedStep
from .runtime.metrics import Metrics
from .runtime.seeds import micro_batch_seed
from .runtime.stage import StepOutput, only_shapes
from .runtime.train_config import require_choice

OBJECTIVES = ("mwer", "grpo")


@dataclass
class GRPOConfig:
    """How far a token's probability may move away from that of the policy that has made the hypothesis."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    scale_advantages: bool = True  # by the spread of the group's rewards
    kl_weight: float = 0.0  # of the divergence from the recogniser that the run began with; above 0 keeps a copy of it

    def __post_init__(self):
        if not (0 < self.clip_low <= 1 and self.clip_high > 0):
            raise ValueError(
                f"grpo.clip_low is {self.clip_low} and grpo.clip_high {self.clip_high}; the ratio of probabilities "
                "stays within 1 - clip_low and 1 + clip_high: set them as 0.2 and 0.28"
            )
        if self.kl_weight < 0:
            raise ValueError(f"grpo.kl_weight is {self.kl_weight}; it must be 0 or more")


@dataclass(kw_only=True)
class MWERConfig(ContextualConfig):
    # What is searched is what the loss hears, so that the encoder runs once: by default nothing is masked or dropped.
    specaugment: SpecAugmentConfig = field(
        default_factory=partial(SpecAugmentConfig, num_time_masks=0, num_freq_masks=0)
    )
    encoder: ConformerConfig = field(default_factory=partial(ConformerConfig, dropout=0.0))
    objective: str = "mwer"
    nbest: NBestConfig = field(default_factory=NBestConfig)
    risk: RiskConfig = field(default_factory=RiskConfig)
    ce_weight: float = 0.01  # lambda: of the cross-entropy of whole transcripts, in nats
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self):
        super().__post_init__()
        require_choice("objective", self.objective, OBJECTIVES)
        require_workers_under_zero_3(self.generation, self.train)
        if self.objective == "grpo" and self.nbest.draw != "sample":
            raise ValueError(
                f"objective is grpo and nbest.draw is {self.nbest.draw}: a policy gradient is an average over samples; "
                "set nbest.draw=sample, or objective=mwer"
            )
        if self.ce_weight < 0:
            raise ValueError(f"ce_weight is {self.ce_weight}; it must be 0 or more")
        if self.objective == "mwer" and self.reward != RewardConfig():
            raise ValueError(
                "reward is set and objective is mwer, which has risks; leave it out, or set objective=grpo"
            )
        if self.objective == "mwer" and self.grpo != GRPOConfig():
            raise ValueError("grpo is set and objective is mwer; leave it out, or set objective=grpo")


class MWER(ContextualTraining):
    """Expected risk, or a clipped policy gradient, over N hypotheses, and a little of sft's loss."""

    Config = MWERConfig
    cfg: MWERConfig

    def build(self, cfg: MWERConfig, inputs: dict[str, Artifact]) -> AudioLLM:
        model = super().build(cfg, inputs)
        self.generation = make_generation(self, cfg, inputs)
        self.first_policy = deepcopy(model).eval().requires_grad_(False) if cfg.grpo.kl_weight else None
        return model

    @property
    def another(self) -> AudioLLM | None:
        """The recogniser that the run began with, where grpo.kl_weight keeps it."""
        return self.first_policy

    def trainable(self, parameter_name: str) -> str | None:
        if self.cfg.ce_weight == 0 and parameter_name.startswith("ctc_head"):
            return None  # its loss is left out with the cross-entropy; weight decay alone would move it
        return super().trainable(parameter_name)

    def prepared(self, steps: Iterator[FedStep], *, weights: WholeModel, step: int) -> Iterator[FedStep]:
        return self.generation.prepared(steps, weights=weights, step=step)

    def count(self, batch: AudioBatch) -> int:
        """Utterances: the loss is a mean over them, whatever their length."""
        return sum(key != STAND_IN_KEY for key in batch.keys)

    # ---- hypotheses

    def generate(
        self,
        model: AudioLLM,
        batch: AudioBatch,
        speech: SpeechOutput | None = None,
        prompts: Prompts | None = None,
    ) -> list[list[Hypothesis]]:
        """Return the hypotheses of each utterance, and behind them the reference where it is to be in the list.

        `speech` is the batch's, where it has been encoded already; without `prompts` they are those of training.
        """
        nbest, given = self.cfg.nbest, _given(prompts or self.prompts(batch))
        if speech is None:
            speech = model.encode_speech(batch.waveforms_BN, batch.lengths_B)
        if nbest.draw == "beam":
            found = model.search(speech, config=nbest.search(model.decode_config), **given)
        else:
            luck = torch.Generator().manual_seed(micro_batch_seed(self.cfg.seed, batch.index, purpose="samples"))
            found = model.sample(
                speech, num=nbest.size, temperature=nbest.temperature, top_p=nbest.top_p, generator=luck, **given
            )
        if nbest.add_reference:
            found = [[*of_one, Hypothesis(ids)] for of_one, ids in zip(found, self.transcripts(batch))]
        if self.cfg.objective == "grpo" and self.cfg.generation.every > 1:
            _note_token_scores(model, speech, found, **given)
        return found

    def _generated(self, model: AudioLLM, batch: AudioBatch, speech: SpeechOutput) -> Generated:
        if only_shapes(model):  # there is nothing to search in
            # As dear as they can be: hypotheses that have no beginning in common.
            size = self.cfg.nbest.size
            lists = [[Hypothesis(ids[n:] + ids[:n]) for n in range(size)] for ids in self.transcripts(batch)]
            return Generated(lists, version=0, seconds=0.0)
        known = {} if model.varies_in_training else {"speech": speech.detach()}
        return self.generation.of(model, batch, **known)

    def nbests(self, batch: AudioBatch, hypotheses: list[list[Hypothesis]]) -> list[NBest]:
        """Judge the hypotheses of a batch. A stand-in for an utterance that could not be read has none."""
        lists, added = [], int(self.cfg.nbest.add_reference)
        for b, (reference, ids) in enumerate(zip(batch.texts, self.transcripts(batch))):
            # One that was cut before its first token is no text, and would have the probability 1.
            heard = [one for one in hypotheses[b] if one.ids or one.complete] if batch.keys[b] != STAND_IN_KEY else []
            texts, found = [self.processor.decode(one.ids) for one in heard], max(0, len(heard) - added)
            texts[found:] = [reference] * (len(heard) - found)
            places = list(range(len(heard)))
            if self.cfg.objective == "mwer":
                places = distinct(texts, normalize=self.normalize)
            texts = [texts[place] for place in places]
            lists.append(
                NBest(
                    hypotheses=[heard[place] for place in places],
                    texts=texts,
                    judgements=self.risks.of(reference, texts, keywords=self._keywords(batch, b)),
                    own=sum(place < found for place in places),
                    found=found,
                    reference=Hypothesis(ids),
                    reference_tokens=self.risks.reference_tokens(reference),
                )
            )
        return lists

    @cached_property
    def risks(self) -> Risks:
        rare: frozenset[str] = frozenset()
        if "rare" in self.cfg.risk.keywords:
            shards = Corpus.open(self.cfg.data.train, remote=self.cfg.data.remote).shards
            texts = (said.text for shard in shards for said in read_shard(shard, lang="").said)
            rare = rare_words(texts, max_count=self.cfg.risk.rare_max_count, normalize=self.normalize)
        return Risks(self.cfg.risk, normalize=self.normalize, rare=rare)

    def _keywords(self, batch: AudioBatch, b: int) -> list[str]:
        """Return what the sources index and context say of one utterance."""
        sources, context = self.cfg.risk.keywords, batch.contexts[b] if batch.contexts is not None else None
        known = list(batch.meta[b].get("keywords") or []) if "index" in sources else []
        return [*known, *context.phrases] if context is not None and "context" in sources else known

    # ---- the loss

    def loss(self, model: AudioLLM, batch: AudioBatch) -> StepOutput:
        prompts = self.prompts(batch)
        given = _given(prompts)
        speech = model.encode_speech(batch.waveforms_BN, batch.lengths_B)
        generated = self._generated(model, batch, speech)
        nbests = self.nbests(batch, generated.hypotheses)
        scored = score_lists(model, speech, nbests, **given)
        if self.cfg.objective == "mwer":
            risks_BN = scored.table([[one.risk for one in nbest.judgements] for nbest in nbests])
            objective_B, metrics = mwer_loss(scored.sums_BN, risks_BN, scored.valid_BN), {}
        else:
            first = None
            if self.first_policy is not None:
                first = self._under_first_policy(batch, nbests, **given)
            objective_B, metrics = self._policy_gradient(batch, nbests, scored, first=first, age=generated.age)
        usable_B = torch.tensor([key != STAND_IN_KEY for key in batch.keys], device=objective_B.device)
        nll_sum = -(scored.references_BT.sum(1) * usable_B).sum()
        smooth_sum = nll_sum
        if self.cfg.ctc_weight and self.cfg.ce_weight:
            ctc = model.speech_ctc_loss(speech, [text_bytes(text) for text in batch.texts])
            smooth_sum = smooth_sum + self.cfg.ctc_weight * ctc.loss_sum
            metrics |= self.ctc_metrics(ctc, batch)
        metrics |= list_metrics(scored, nbests, unit=self.cfg.risk.unit) | self.prompt_metrics(batch, prompts)
        metrics |= {
            "nll": (nll_sum.detach(), self.target_tokens(batch)),
            "rl/age": (generated.age, 1),
            "time/generation_s": (generated.seconds, 1),
            "time/waiting_s": (generated.waited, 1),
            "time/scoring_s": (scored.seconds, 1),
        }
        return StepOutput(objective_B.sum() + self.cfg.ce_weight * smooth_sum, metrics)

    def _policy_gradient(
        self, batch: AudioBatch, nbests: list[NBest], scored: ScoredLists, *, first: Tensor | None, age: int
    ) -> tuple[Tensor, Metrics]:
        """Return loss_B of GRPO, and what is logged of it."""
        cfg, valid_BN = self.cfg.grpo, usable(scored.sums_BN.detach(), scored.valid_BN)
        mask_BNT = scored.mask_BNT & valid_BN[..., None]
        rewards_BN = scored.table([self._rewards(batch, b, nbest) for b, nbest in enumerate(nbests)]) * valid_BN
        old_BNT = scored.log_probs_BNT.detach()
        if age:  # the weights have moved on since
            old_BNT = scored.token_table([[one.token_scores for one in nbest.hypotheses] for nbest in nbests])
        loss_B, cut = grpo_loss(
            scored.log_probs_BNT,
            old_BNT,
            group_advantages(rewards_BN, valid_BN, scale=cfg.scale_advantages),
            mask_BNT,
            clip_low=cfg.clip_low,
            clip_high=cfg.clip_high,
            reference_log_probs_BNT=first,
            kl_weight=cfg.kl_weight,
        )
        centred_BN = group_advantages(rewards_BN, valid_BN, scale=False)
        hypotheses, tokens = valid_BN.sum(), mask_BNT.sum()
        metrics: Metrics = {
            "rl/reward_mean": (rewards_BN.sum(), hypotheses),
            "rl/reward_variance": (centred_BN.square().sum(), hypotheses),
            "rl/clipped_frac": (cut * tokens, tokens),
        }
        if first is not None:
            log_ratio_BNT = scored.log_probs_BNT.detach() - first
            metrics["rl/kl"] = (log_ratio_BNT.masked_fill(~mask_BNT, 0).sum(), tokens)
        return loss_B, metrics

    def _rewards(self, batch: AudioBatch, b: int, nbest: NBest) -> list[float]:
        context, risk = batch.contexts[b] if batch.contexts is not None else None, self.cfg.risk
        judged = partial(
            reward_of,
            self.cfg.reward,
            self.normalize(batch.texts[b]),
            unit=risk.unit,
            keywords=self.risks.phrases_in(batch.texts[b], *nbest.texts, keywords=self._keywords(batch, b)),
            keyword_weight=risk.keyword_weight,
            phrases=[self.normalize(phrase) for phrase in (context.phrases if context is not None else ())],
        )
        return [judged(self.normalize(text)) for text in nbest.texts]

    @torch.no_grad()
    def _under_first_policy(self, batch: AudioBatch, nbests: list[NBest], **given) -> Tensor:
        """Return the log-probabilities of the hypotheses' tokens under the recogniser that the run began with."""
        assert self.first_policy is not None
        model = self.first_policy = self.first_policy.to(batch.waveforms_BN.device)
        speech = model.encode_speech(batch.waveforms_BN, batch.lengths_B)
        return score_lists(model, speech, nbests, **given).log_probs_BNT

    # ---- how well it does

    def beyond_greedy(self, model: AudioLLM, batch: AudioBatch) -> Metrics:
        """What N-best lists say under each condition: the error rate of the first, of the best, the expected one."""
        speech, found = model.encode_speech(batch.waveforms_BN, batch.lengths_B), {}
        for prefix, prompts in self.conditions(batch).items():
            hypotheses = generate(self, model, batch, seed=self.cfg.seed, speech=speech, prompts=prompts)
            nbests = self.nbests(batch, hypotheses)
            scored = score_lists(model, speech, nbests, **_given(prompts))
            metrics = list_metrics(scored, nbests, unit=self.cfg.risk.unit)
            found |= {name.replace("rl/", f"rl/{prefix}"): metric for name, metric in metrics.items()}
        return found


def _given(prompts: Prompts) -> dict[str, Any]:
    """Return the prompts as the model's keyword arguments."""
    return {"contexts_ids": prompts.contexts_ids, "languages": prompts.languages}


def _note_token_scores(model: AudioLLM, speech: SpeechOutput, samples: list[list[Hypothesis]], **given) -> None:
    """Write into each sample what its tokens scored under the weights that made it, for the ratios of later steps."""
    scored = score_candidates(model, speech, samples, **given)
    rows = iter(zip(scored.log_probs_MT.tolist(), scored.mask_MT.sum(1).tolist()))
    for one, (log_probs, tokens) in zip((one for of_one in samples for one in of_one), rows):
        one.token_scores = log_probs[:tokens]
