"""Prefix probabilities against torch's CTC loss, summed over every string that there is."""

import itertools
import math

import pytest
import torch

from seedling.model.ctc_prefix import CTCPrefixes, TokenBytes, token_bytes
from seedling.model.ctc_scorer import CTCGains, CTCScorer
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
