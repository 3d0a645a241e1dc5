"""Prefix probabilities against torch's CTC loss, summed over every string that there is, and against plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from seedling.model.ctc_prefix import CTCPrefixes, TokenBytes, token_bytes
from seedling.model.ctc_scorer import Continuations, CTCGains, CTCScorer
from seedling.model.decoding import DecodeConfig, decode

W = 4  # three "bytes" and the blank


def log_probs_of(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(lengths), max(lengths), W, generator=generator).log_softmax(-1), torch.tensor(lengths)


def probability(log_probs_TW: torch.Tensor, string: tuple[int, ...]) -> float:
    """P(string) by torch's loss; 0 where it cannot fit."""
    T = len(log_probs_TW)
    loss = torch.nn.functional.ctc_loss(
        log_probs_TW[:, None].double(),
        torch.tensor([string], dtype=torch.long),
        torch.tensor([T]),
        torch.tensor([len(string)]),
        blank=W - 1,
        reduction="sum",
    )
    return math.exp(-loss.item())


def all_strings(longest: int):
    return itertools.chain.from_iterable(itertools.product(range(W - 1), repeat=n) for n in range(longest + 1))


@pytest.mark.parametrize("T", [1, 2, 5])
def test_prefix_and_whole_probabilities_equal_the_sum_over_all_strings(T):
    log_probs, lengths = log_probs_of(T)
    ctc = CTCPrefixes(log_probs, lengths)
    P = {string: probability(log_probs[0], string) for string in all_strings(T)}
    row = torch.zeros(1, dtype=torch.long)
    for string in all_strings(min(T, 3)):
        prefix = ctc.empty()
        for byte in string:
            prefix = ctc.extend(prefix, row, torch.tensor([byte]))
        as_prefix = sum(p for other, p in P.items() if other[: len(string)] == string)
        assert prefix.score_R.exp().item() == pytest.approx(as_prefix, rel=1e-6), string
        assert ctc.whole(prefix).exp().item() == pytest.approx(P[string], rel=1e-6, abs=1e-300), string


def test_padding_and_batch_do_not_change_a_prefix():
    log_probs, lengths = log_probs_of(3, 6)
    log_probs[0, 3:] = float("nan")
    together, alone = CTCPrefixes(log_probs, lengths), CTCPrefixes(log_probs[:1, :3], lengths[:1])
    both, one = together.empty(), alone.empty()
    for byte in (0, 0, 2):
        both = together.extend(both, torch.arange(2), torch.tensor([byte, 1]))
        one = alone.extend(one, torch.tensor([0]), torch.tensor([byte]))
    assert both.score_R[0].item() == pytest.approx(one.score_R[0].item())
    assert together.whole(both)[0].item() == pytest.approx(alone.whole(one)[0].item())


# --- against the recursion as it is written, frame by frame, in logs --------------------------------------------------


def by_the_letter(log_probs_TW: torch.Tensor, string: list[int]) -> tuple[list[float], float]:
    """Return the log prefix probabilities of all beginnings of the string, and that it is all that was said."""
    log_probs_TW = log_probs_TW.double().numpy()
    T, blank = len(log_probs_TW), log_probs_TW.shape[1] - 1
    on_T, blank_T = np.full(T, -np.inf), np.cumsum(log_probs_TW[:, blank])
    scores, last = [0.0], None
    for byte in string:
        before_T = blank_T if byte == last else np.logaddexp(on_T, blank_T)
        before_T = np.concatenate([[0.0 if last is None else -np.inf], before_T[:-1]])[:T]
        scores.append(float(np.logaddexp.reduce(before_T + log_probs_TW[:, byte], initial=-np.inf)))
        on_T, blank_T, on, off = np.empty(T), np.empty(T), -np.inf, -np.inf
        for t in range(T):
            on, off = np.logaddexp(on, before_T[t]) + log_probs_TW[t, byte], np.logaddexp(on, off)
            off += log_probs_TW[t, blank]
            on_T[t], blank_T[t] = on, off
        last = byte
    if T == 0:
        return scores, 0.0 if last is None else -math.inf
    return scores, float(np.logaddexp(on_T[-1], blank_T[-1]))


def by_ours(ctc: CTCPrefixes, string: list[int]) -> tuple[list[float], float]:
    prefix, row = ctc.empty(), torch.tensor([0])
    scores = [prefix.score_R[0].item()]
    for byte in string:
        score = ctc.scores(prefix, row, torch.tensor([byte]))
        prefix = ctc.extend(prefix, row, torch.tensor([byte]))
        assert torch.equal(prefix.score_R, score)
        scores.append(score[0].item())
    return scores, ctc.whole(prefix)[0].item()


def assert_equal(ours: tuple[list[float], float], theirs: tuple[list[float], float]) -> None:
    assert [*ours[0], ours[1]] == pytest.approx([*theirs[0], theirs[1]], rel=1e-9, abs=1e-9)


def peaky(frames: int, classes: int, *, seed: int, spread: float, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(frames, classes, generator=generator, dtype=dtype)).log_softmax(-1)


@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 33, 120])
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_scores_are_those_of_the_recursion_as_written(T, spread):
    for seed in range(4):
        log_probs_TW = peaky(T, 5, seed=seed, spread=spread)
        string = torch.randint(4, (10,), generator=torch.Generator().manual_seed(seed)).tolist()
        string[4:6] = [string[3]] * 2  # three in a row need blanks between them
        ctc = CTCPrefixes(log_probs_TW[None], torch.tensor([T]))
        assert_equal(by_ours(ctc, string), by_the_letter(log_probs_TW, string))


def test_frames_and_strings_that_are_impossible_stay_so():
    log_probs_TW = peaky(40, 5, seed=0, spread=3.0)
    log_probs_TW[torch.rand(40, 5, generator=torch.Generator().manual_seed(1)) < 0.15] = -math.inf
    log_probs_TW[:, 3] = -math.inf
    ctc = CTCPrefixes(log_probs_TW[None], torch.tensor([40]))
    # What is impossible by the letter may be e^-1000 here: sums over frames must stay defined.
    for string in ([0, 1, 1, 2], [3], [0, 3, 1], [0, 1] * 25):
        ours, theirs = by_ours(ctc, string), by_the_letter(log_probs_TW, string)
        for a, b in zip([*ours[0], ours[1]], [*theirs[0], theirs[1]]):
            assert a == pytest.approx(b, rel=1e-9) if b > -math.inf else a < -900
        assert not any(map(math.isnan, ours[0]))


def test_five_minutes_in_one_window_neither_underflow_nor_lose_digits():
    """7500 frames at 15 nats each are e^-100000. The string comes at the end, behind much that spoke against it."""
    log_probs_TW = peaky(7500, 6, seed=0, spread=6.0)
    string = log_probs_TW[-60:, :5].argmax(-1)[::3].tolist()
    ctc = CTCPrefixes(log_probs_TW[None], torch.tensor([7500]), window=7500)
    assert_equal(by_ours(ctc, string), by_the_letter(log_probs_TW, string))


def test_a_tree_of_strings_scores_each_as_if_it_were_alone():
    lengths = [50, 31]
    log_probs_BTW = torch.stack([peaky(50, 5, seed=b, spread=4.0) for b in range(2)])
    ctc = CTCPrefixes(log_probs_BTW, torch.tensor(lengths))
    rows = torch.tensor([0, 1, 1])  # two hypotheses of the second utterance
    prefix = ctc.extend(ctc.empty().of(rows), torch.arange(3), torch.tensor([2, 0, 1]))
    said = [[2], [0], [1]]
    generator = torch.Generator().manual_seed(0)
    length_N = torch.randint(0, 6, (60,), generator=generator)
    row_N, bytes_NY = torch.arange(60) % 3, torch.randint(0, 3, (60, 5), generator=generator)
    tree = Continuations(ctc, prefix, row_N, bytes_NY, length_N)
    tree.spell(2)
    some = torch.randperm(60, generator=generator)[:30]
    halfway, wholes = tree.score_N.tolist(), tree.of(some)
    wholes.spell()
    found = [(n, score, 2) for n, score in enumerate(halfway)]
    for n, score, most in found + [(n, score, 5) for n, score in zip(some.tolist(), wholes.score_N.tolist())]:
        row, string = int(row_N[n]), bytes_NY[n, : min(int(length_N[n]), most)].tolist()
        b = int(rows[row])
        theirs, _ = by_the_letter(log_probs_BTW[b, : lengths[b]], said[row] + string)
        assert score == pytest.approx(theirs[-1], abs=1e-9)


class FlatLLM:
    """Every token as likely as any other: what is found is CTC's choice."""

    def __init__(self, vocabulary: int):
        self.vocabulary, self.rows = vocabulary, 0

    def start(self, prefixes):
        self.rows = len(prefixes)
        return self.step(torch.zeros(self.rows))

    def step(self, tokens_R):
        return torch.full((len(tokens_R), self.vocabulary), -math.log(self.vocabulary))

    def select(self, rows_R):
        self.rows = len(rows_R)


class Spelling:
    """Tokens of bytes 0 to 2: single ones, pairs, one with the byte twice; token 0 ends, token 1 is special."""

    bytes_of = [(), (), (0,), (1,), (2,), (0, 1), (2, 2)]

    def tokens(self) -> TokenBytes:
        tokens = TokenBytes.__new__(TokenBytes)
        tokens.bytes_VY = torch.tensor([[*s, *[0] * (2 - len(s))] for s in self.bytes_of])
        tokens.lengths_V = torch.tensor([len(s) for s in self.bytes_of])
        tokens.starts_with_space_V = torch.zeros(len(self.bytes_of), dtype=torch.bool)
        return tokens


def joint(log_probs, lengths, *, weight, candidates=7):
    spelling = Spelling()
    gains = CTCGains(
        CTCPrefixes(log_probs, lengths), tokens=spelling.tokens(), end=0, weight=weight, candidates=candidates
    )
    return CTCScorer(FlatLLM(len(spelling.bytes_of)), gains)


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_string_and_score_that_brute_force_finds(seed):
    log_probs, lengths = log_probs_of(4, 2, seed=seed)
    weight = 0.999
    config = DecodeConfig(beam_size=200, nbest=1, length_penalty=0.0, stop="never", context_top_k=0)
    found = decode(joint(log_probs, lengths, weight=weight), [None, None], limits=[6, 6], end=0, config=config)
    spell = Spelling.bytes_of
    for b, length in enumerate(lengths.tolist()):
        best = -math.inf
        for n in range(5):
            for ids in itertools.product(range(2, len(spell)), repeat=n):
                string = tuple(byte for token in ids for byte in spell[token])
                if len(string) <= length:
                    p = probability(log_probs[b, :length], string)
                    flat = -(n + 1) * math.log(len(spell))
                    best = max(best, weight * math.log(p) + (1 - weight) * flat if p else -math.inf)
        assert found[b][0].score == pytest.approx(best, abs=1e-4)


def test_special_tokens_and_tokens_beyond_the_candidates_are_never_chosen():
    log_probs, lengths = log_probs_of(5)
    scores = joint(log_probs, lengths, weight=0.5, candidates=3).start([None])
    assert scores[0, 1] == -math.inf
    assert scores[0].isfinite().sum() <= 1 + 3
    assert scores[0, 0].isfinite(), "the end token is always scored"


def test_tokens_of_byte_level_and_sentencepiece_vocabularies_are_the_bytes_of_their_text():
    from seedling.data.tokenizer import train_bpe

    tokenizer = train_bpe(["call zoë now", "call mark"], vocab_size=280)
    spelled = token_bytes(tokenizer)
    for text in ("call zoë", "mark 北京 now"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(spelled[i] for i in ids) == (" " + text).encode()
    assert all(spelled[i] == b"" for i in tokenizer.all_special_ids)

    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜end▁of▁turn｜>"]})
    assert token_bytes(tokenizer) == [*spelled, b""]

    class Pieces:
        all_special_ids = [0]

        def get_added_vocab(self):
            return {"<s>": 0}

        def __len__(self):
            return 4

        def convert_ids_to_tokens(self, ids):
            return [["<s>", "▁call", "<0xE5>", "ß"][i] for i in ids]

    assert token_bytes(Pieces()) == [b"", b" call", b"\xe5", "ß".encode()]
