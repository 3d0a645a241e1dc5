"""A step of reinforcement learning against a straightforward one: same hypotheses, same loss, in one run.

    python benchmarks/rl_step.py [--sizes demo 6x512] [--nbest 4 8] [--utterances 8] [--rounds 3] [--frozen] [--quick]

A step makes N hypotheses of every utterance by beam search, scores them with gradient, and takes the MWER loss and its
gradient. Straightforward: `transformers.generate` on the prompts' embeddings, then N whole forward passes of the
recogniser, the n-th on the n-th hypothesis of all utterances. Ours: `transcribe_ids`, then one encoder pass and
`score_candidates`, which has all hypotheses of an utterance behind one prompt; also with a row for each of them, to
tell what that is worth. Asserted: equal N-best lists, equal losses, and gradients of equal direction and size.

Weights are random, those of the LLMs as in benchmarks/decoding.py, and hypotheses about as long as transcripts of 8 s:
some end before the limit. The table says how long they are, and how many of their tokens others of the list share.
Everything is trained, as in the demo; `--frozen` leaves the LLM out, as Seed-ASR does. Generation has an encoder pass
of its own in all of them, as it may run elsewhere. Neither the optimizer nor the edit distance is in the numbers.
Medians of CPU seconds, turn by turn, so that other work on the machine hardly counts.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seedling.data.scoring import count_errors
from seedling.model.audio_llm import AudioLLM
from seedling.model.augment import SpecAugmentConfig
from seedling.model.candidate_scoring import TokenTree, score_candidates
from seedling.model.conformer import PRESETS, ConformerConfig
from seedling.model.decoding import DecodeConfig, Hypothesis
from seedling.stages.reinforcement.objectives import mwer_loss

sys.path.append(str(Path(__file__).resolve().parent))  # left out where PYTHONSAFEPATH is set
from decoding import END, FIRST_WORD, SIZES, by_generate, random_recogniser, set_end, waveforms_of

ENCODERS = {
    "demo": PRESETS["demo"],
    "6x512": ConformerConfig(dim=320, num_layers=8, num_heads=8, dropout=0.0),
}
LIMIT = 30  # tokens: of 8 s at 3.5 a second, and two more
PARTS = ("encoder", "generation", "scoring", "backward")
Batch = tuple[Tensor, Tensor]


class Clock:
    """CPU seconds of each part. One within another counts for itself alone."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._parts: list[str] = []
        self._since = 0.0

    def start(self, part: str) -> None:
        self._book()
        self._parts.append(part)

    def stop(self) -> None:
        self._book()
        self._parts.pop()

    def _book(self) -> None:
        now = time.process_time()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    def encoder_of(self, model: AudioLLM) -> None:
        """Count every encoder pass from now on, from waveform to speech embeddings."""
        model.fbank.register_forward_pre_hook(lambda *_: self.start("encoder"))
        model.converter.register_forward_hook(lambda *_: self.stop())


# --- the risks -------------------------------------------------------------------------------------------------------


def risks_of(nbests: list[list[Hypothesis]]) -> Tensor:
    """Return risks_BN: token errors against a reference that lies between the hypotheses."""
    rng = np.random.default_rng(0)
    references = [[i if rng.random() < 0.8 else FIRST_WORD for i in nbest[len(nbest) // 2].ids] for nbest in nbests]
    words = [[[str(i) for i in h.ids] for h in nbest] for nbest in nbests]
    return torch.tensor(
        [
            [float(count_errors([*map(str, r)], hypothesis).errors) for hypothesis in of]
            for r, of in zip(references, words)
        ]
    )


# --- the two ways to make and to score hypotheses --------------------------------------------------------------------


def beam_config(n: int) -> DecodeConfig:
    # Not by seconds: generate has one limit for all.
    return DecodeConfig(beam_size=n, nbest=n, max_new_tokens=LIMIT, max_tokens_per_second=0.0, extra_tokens=LIMIT)


def our_nbests(model: AudioLLM, batch: Batch, n: int) -> list[list[Hypothesis]]:
    return model.transcribe_ids(*batch, config=beam_config(n))


@torch.no_grad()
def their_nbests(model: AudioLLM, batch: Batch, n: int) -> list[list[Hypothesis]]:
    prompts = model.build_prompt(model.encode_speech(*batch))
    generated = by_generate(model.llm, prompts, beams=n, nbest=n, limit=LIMIT)
    found = [Hypothesis(ids, complete=len(ids) < LIMIT) for ids in generated]
    return [found[first : first + n] for first in range(0, len(found), n)]


def our_scores(model: AudioLLM, batch: Batch, nbests: list[list[Hypothesis]], *, trees: bool = True) -> Tensor:
    scored = score_candidates(model, model.encode_speech(*batch), nbests, trees=trees)
    return scored.sums_M.view(len(nbests), -1)


def their_scores(model: AudioLLM, batch: Batch, nbests: list[list[Hypothesis]]) -> Tensor:
    scores = []
    for nth in zip(*nbests):
        out = model(*batch, [h.ids for h in nth])
        # A forward pass has an end token for each; what was cut at its limit has none.
        counts_N = torch.tensor([counts for h in nth for counts in [True] * len(h.ids) + [h.complete]])
        scores.append(out.nll_N.new_zeros(len(nth)).index_add(0, out.rows_N, -out.nll_N * counts_N))
    return torch.stack(scores, dim=1)


WAYS: dict[str, tuple[Callable[..., list[list[Hypothesis]]], Callable[..., Tensor]]] = {
    "straightforward": (their_nbests, their_scores),
    "ours, a row a hypothesis": (our_nbests, lambda *args: our_scores(*args, trees=False)),
    "ours": (our_nbests, our_scores),
}


def step(way: str, model: AudioLLM, batch: Batch, risks_BN: Tensor, clock: Clock) -> float:
    """Run a step and return its loss; gradients are left in the model."""
    generate, score = WAYS[way]
    model.zero_grad(set_to_none=True)
    clock.start("generation")
    nbests = generate(model.eval(), batch, risks_BN.shape[1])
    clock.stop()
    clock.start("scoring")
    scores_BN = score(model.train(), batch, nbests)
    loss = mwer_loss(scores_BN, risks_BN, torch.ones_like(risks_BN, dtype=torch.bool)).sum()
    clock.stop()
    clock.start("backward")
    loss.backward()
    clock.stop()
    return loss.item()


# --- measuring -------------------------------------------------------------------------------------------------------


def gradient(model: AudioLLM) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_equal_steps(model: AudioLLM, batch: Batch, nbests: list[list[Hypothesis]], risks_BN: Tensor) -> None:
    generated = their_nbests(model.eval(), batch, risks_BN.shape[1])
    assert [[h.ids for h in nbest] for nbest in generated] == [[h.ids for h in nbest] for nbest in nbests]
    found = {}
    for way in WAYS:
        loss = step(way, model, batch, risks_BN, Clock())
        found[way] = loss, gradient(model)
    expected_loss, expected = found["straightforward"]
    for way, (loss, own) in found.items():
        assert abs(loss - expected_loss) <= 1e-4 * risks_BN.mean(), f"{way}: loss {loss}, expected {expected_loss}"
        assert (own - expected).norm() <= 1e-2 * expected.norm(), f"{way}: another gradient"


def measured(size: str, n: int, args: argparse.Namespace) -> Iterator[str]:
    model = random_recogniser(size, ENCODERS[size], specaugment=SpecAugmentConfig(0, num_freq_masks=0))
    assert model.prompt_tokens.end == END
    set_end(model.llm, SIZES[size][-1])
    model.llm.requires_grad_(not args.frozen)
    seconds = np.random.default_rng(0).uniform(2, 14, size=args.utterances)
    batch = waveforms_of(seconds)
    nbests = our_nbests(model, batch, n)
    assert all(len(nbest) == n for nbest in nbests)
    risks_BN = risks_of(nbests)
    assert_equal_steps(model, batch, nbests, risks_BN)

    clock, took = Clock(), {way: [] for way in WAYS}
    clock.encoder_of(model)
    for _ in range(args.rounds):
        for way in WAYS:
            clock.seconds.clear()
            step(way, model, batch, risks_BN, clock)
            took[way].append([clock.seconds[part] for part in PARTS])
    median = {way: np.median(rounds, axis=0) for way, rounds in took.items()}
    whole = {way: float(np.median(np.sum(rounds, axis=1))) for way, rounds in took.items()}
    lengths = [len(h.ids) for nbest in nbests for h in nbest]
    nodes = sum(len(TokenTree([h.ids + [END] * h.complete for h in nbest]).tokens) for nbest in nbests)
    found = f"{np.mean(lengths):.0f} ({min(lengths)}-{max(lengths)}) | {1 - nodes / sum(lengths):.0%}"
    for way in WAYS:
        cells = " | ".join(f"{x:.2f}" for x in [*median[way], whole[way]])
        yield f"| {size} | {n} | {found} | {way} | {cells} | {whole['straightforward'] / whole[way]:.2f}x |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--nbest", nargs="+", type=int, default=[4, 8], help="N, which is also the number of beams")
    parser.add_argument("--utterances", type=int, default=8, help="in a batch, of 2 to 14 s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frozen", action="store_true", help="train encoder and converter only")
    parser.add_argument("--quick", action="store_true", help="the demo's shape, N = 4, one round of 4 utterances")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.nbest, args.utterances, args.rounds = ["demo"], [4], 4, 1
    torch.set_num_threads(1)  # CPU seconds are those of one core
    trained = "encoder and converter" if args.frozen else "everything"
    print(f"CPU seconds a step of {args.utterances} utterances, {trained} trained, equal lists and losses", end="\n\n")
    print("| recogniser | N | tokens | shared | way | encoder | generation | scoring | backward | step | is |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        for n in args.nbest:
            for line in measured(size, n, args):
                print(line, flush=True)


if __name__ == "__main__":
    main()
