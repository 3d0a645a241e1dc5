"""Beam search against transformers' own, and joint context search against plain, on one core, in one run.

    python benchmarks/decoding.py [--sizes demo 6x512] [--utterances 16 32] [--beams 4 8] [--rounds 3]

The LLMs have random weights, and prompts the lengths of 2 to 14 s of speech at 12.5 embeddings a second behind an
instruction. Against `generate`: same model, prompts, beams and limit, equal transcripts asserted. The end token's logit
is raised so that hypotheses end at all lengths up to the limit; `generate` goes on with those that have ended until the
last one has, ours leave the batch. Joint against plain: the end token is out of reach, and every utterance runs to a
limit of 3.5 tokens a second, so that both searches take exactly the same steps; a whole recogniser (the demo's: encoder
4 x 160, CTC head) adds what both share. Runs of a row take turns; medians of CPU seconds, so that other work on the
machine does not count.

What bounds joint search: on a CPU a step of many rows is bound by arithmetic, so the LLM's second half costs what the
first does, and the ratio to a search without context goes to 2 and, with a long context to read, beyond.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from seedling.data.tokenizer import train_bpe
from seedling.model.audio_llm import AudioLLM
from seedling.model.conformer import PRESETS, ConformerConfig, ConformerEncoder
from seedling.model.context_search import ContextPrompt, ContextScorer
from seedling.model.converter import ConverterConfig
from seedling.model.decoding import DecodeConfig, Hypothesis, decode
from seedling.model.llm_scorer import RowScorer, llm_scorer

END, FIRST_WORD = 2, 3
INSTRUCTION, PER_SECOND, TOKENS_PER_SECOND = 19, 12.5, 3.5
LIMIT = 60  # tokens, against generate
SIZES = {
    # layers, width, heads, vocabulary, initial spread, what is added to the end token's logit
    "demo": (2, 128, 4, 1200, 0.1, 1.5),
    "6x512": (6, 512, 8, 8000, 0.05, 2.5),
}
CONTEXTS = {"a sentence (20 tokens)": 20, "100 names (400 tokens)": 400}


def random_llm(size: str) -> LlamaForCausalLM:
    """Return an LM whose output depends on its prompt; the head gets a bias, zero for now."""
    layers, width, heads, vocabulary, spread, _ = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
    )
    llm = LlamaForCausalLM(config).eval()
    llm.lm_head.bias = torch.nn.Parameter(torch.zeros(vocabulary), requires_grad=False)
    return llm


def set_end(llm: LlamaForCausalLM, logit: float) -> None:
    llm.lm_head.bias[END] = logit


class Speech:
    """Prompts as of utterances between 2 and 14 seconds."""

    def __init__(self, llm: LlamaForCausalLM, *, utterances: int, context_tokens: int = 0):
        rng = np.random.default_rng(0)
        self.seconds = rng.uniform(2, 14, size=utterances)
        table = llm.get_input_embeddings().weight.detach()

        def embedded(tokens: int) -> Tensor:
            return table[torch.from_numpy(rng.integers(FIRST_WORD, len(table), size=tokens))]

        instruction, other_instruction = embedded(INSTRUCTION), embedded(INSTRUCTION + 12)
        speech = [embedded(int(s * PER_SECOND)) for s in self.seconds]
        self.plain = [torch.cat([instruction, s]) for s in speech]
        # Lists differ a little in length, as lists do.
        contexts = [embedded(int(context_tokens * rng.uniform(0.9, 1.1))) for _ in speech]
        self.with_context = [torch.cat([other_instruction, c, s]) for c, s in zip(contexts, speech)]
        self.limits = [max(2, round(s * TOKENS_PER_SECOND)) for s in self.seconds]


def by_generate(
    llm: LlamaForCausalLM, prompts: list[Tensor], *, beams: int, nbest: int = 1, limit: int = LIMIT
) -> list[list[int]]:
    """Return the `nbest` transcripts of the first prompt, of the second, and so on, in one list."""
    longest = max(map(len, prompts))
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = llm.generate(
        inputs_embeds=torch.stack([torch.nn.functional.pad(p, (0, 0, longest - len(p), 0)) for p in prompts]),
        attention_mask=mask,
        generation_config=GenerationConfig(
            eos_token_id=END,
            pad_token_id=0,
            do_sample=False,
            num_beams=beams,
            num_return_sequences=nbest,
            max_new_tokens=limit,
        ),
    )
    return [ids[: ids.index(END)] if END in ids else ids for ids in out.tolist()]


def best(nbests: list[list[Hypothesis]]) -> list[list[int]]:
    return [nbest[0].ids for nbest in nbests]


def medians(runs: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Return each run's median CPU seconds; they take turns, and a first turn does not count."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if turn:
                took[name].append(time.process_time() - started)
    return {name: float(np.median(seconds)) for name, seconds in took.items()}


def against_generate(llm: LlamaForCausalLM, size: str, args: argparse.Namespace) -> list[str]:
    set_end(llm, SIZES[size][-1])
    lines = []
    for utterances in args.utterances:
        prompts = Speech(llm, utterances=utterances).plain
        for beams in args.beams:
            config = DecodeConfig(beam_size=beams, max_new_tokens=LIMIT)

            def search(make, *, prompts=prompts, config=config):
                return best(decode(make(llm), prompts, limits=[LIMIT] * len(prompts), end=END, config=config))

            expected = by_generate(llm, prompts, beams=beams)
            assert search(llm_scorer) == expected == search(RowScorer), "all must find the same"
            runs = {
                "generate": lambda prompts=prompts, beams=beams: by_generate(llm, prompts, beams=beams),
                "rows": lambda search=search: search(RowScorer),
                "trees": lambda search=search: search(llm_scorer),
            }
            took = medians(runs, rounds=args.rounds)
            lengths = sorted(map(len, expected))
            speeds = " | ".join(f"{utterances / took[name]:.1f}" for name in runs)
            lines.append(
                f"| {size} | {utterances} | {beams} | {lengths[0]}-{lengths[-1]}, mean {np.mean(lengths):.0f} | "
                f"{speeds} | {took['generate'] / took['rows']:.2f}x | {took['generate'] / took['trees']:.2f}x |"
            )
    return lines


def joint_against_plain(llm: LlamaForCausalLM, size: str, args: argparse.Namespace) -> list[str]:
    set_end(llm, -1e4)
    lines = []
    for name, tokens in CONTEXTS.items():
        speech = Speech(llm, utterances=args.utterances[0], context_tokens=tokens)
        pairs = [ContextPrompt(*prompts) for prompts in zip(speech.plain, speech.with_context)]
        for beams in args.beams:
            config = DecodeConfig(beam_size=beams, max_new_tokens=LIMIT)

            def search(scorer, prompts, *, limits=speech.limits, config=config):
                return decode(scorer, prompts, limits=limits, end=END, config=config)

            runs = {
                "without": lambda search=search, speech=speech: search(llm_scorer(llm), speech.plain),
                "with": lambda search=search, speech=speech: search(llm_scorer(llm), speech.with_context),
                "joint": lambda search=search, pairs=pairs, config=config: search(
                    ContextScorer(llm_scorer(llm), config=config), pairs
                ),
            }
            took = medians(runs, rounds=args.rounds)
            lines.append(joint_row(size, name, beams, took, utterances=args.utterances[0]))
    return lines


def random_recogniser(size: str, encoder: ConformerConfig, **parts) -> AudioLLM:
    """Return a whole recogniser with random weights, in evaluation mode; its LLM is that of `random_llm`."""
    llm, rng = random_llm(size), np.random.default_rng(0)
    letters = list("etaoinshrdlu")
    words = ["".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(4000)]
    tokenizer = train_bpe(words, vocab_size=min(SIZES[size][3], 1200))
    torch.manual_seed(0)
    encoder, converter = ConformerEncoder(encoder), ConverterConfig(stride=2)
    return AudioLLM.assemble(encoder=encoder, llm=llm, tokenizer=tokenizer, converter=converter, **parts).eval()


def waveforms_of(seconds: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return noise of these lengths: waveforms_BN and lengths_B."""
    lengths_B = torch.tensor([int(16000 * s) for s in seconds])
    return 0.1 * torch.randn(len(lengths_B), int(lengths_B.max())), lengths_B


def whole_recogniser(args: argparse.Namespace) -> Iterator[str]:
    """Joint against plain, waveforms to hypotheses, at the demo's shape, without and with the CTC head."""
    model, rng = random_recogniser("demo", PRESETS["demo"], ctc=True), np.random.default_rng(1)
    llm = model.llm
    set_end(llm, -1e4)
    speech = Speech(llm, utterances=args.utterances[0])
    waveforms_BN, lengths_B = waveforms_of(speech.seconds)
    for ctc_weight in (0.0, 0.3):
        for name, tokens in CONTEXTS.items():
            contexts = [rng.integers(FIRST_WORD, 1200, size=tokens).tolist() for _ in lengths_B]
            for beams in args.beams:
                settings = {"beam_size": beams, "max_tokens_per_second": TOKENS_PER_SECOND, "extra_tokens": 0}

                def transcribe(contexts, search, *, settings=settings, ctc_weight=ctc_weight):
                    config = DecodeConfig(ctc_weight=ctc_weight, context_search=search, **settings)
                    return model.transcribe_ids(waveforms_BN, lengths_B, contexts_ids=contexts, config=config)

                runs = {
                    "without": lambda run=transcribe: run(None, "plain"),
                    "with": lambda run=transcribe, contexts=contexts: run(contexts, "plain"),
                    "joint": lambda run=transcribe, contexts=contexts: run(contexts, "joint"),
                }
                took = medians(runs, rounds=args.rounds)
                what = "recogniser" + (f", CTC {ctc_weight}" if ctc_weight else "")
                yield joint_row(what, name, beams, took, utterances=len(lengths_B))


def joint_row(what: str, context: str, beams: int, took: dict[str, float], *, utterances: int) -> str:
    speeds = " | ".join(f"{utterances / seconds:.1f}" for seconds in took.values())
    ratios = f"{took['joint'] / took['without']:.2f}x | {took['joint'] / took['with']:.2f}x"
    return f"| {what} | {context} | {beams} | {speeds} | {ratios} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--utterances", nargs="+", type=int, default=[16, 32], help="in a batch; joint takes the first")
    parser.add_argument("--beams", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tables", nargs="+", choices=("generate", "joint"), default=["generate", "joint"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "generate" in args.tables:
        print("Hypotheses a CPU second: plain beam search, equal transcripts", end="\n\n")
        print("| LLM | utterances | beams | tokens found | generate | a row a beam | trees | rows are | trees are |")
        print("|---|---|---|---|---|---|---|---|---|")
        for size in args.sizes:
            for line in against_generate(random_llm(size), size, args):
                print(line, flush=True)
    if "joint" in args.tables:
        print("\nHypotheses a CPU second: joint against plain beam search, equal steps", end="\n\n")
        print("| model | context | beams | without | with | joint | joint / without | joint / with |")
        print("|---|---|---|---|---|---|---|---|")
        for size in args.sizes:
            for line in joint_against_plain(random_llm(size), size, args):
                print(line, flush=True)
        if "demo" in args.sizes:
            for line in whole_recogniser(args):
                print(line, flush=True)


if __name__ == "__main__":
    main()
