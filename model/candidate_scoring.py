"""Log-probabilities of candidate transcripts, with gradient: what training on an N-best list needs.

The encoder has run before, once: its gradient is that of all candidates. Those of an utterance are a tree of tokens in
one row behind one prompt, so that the prompt and every common beginning are computed once:

    prompt | turn on the light off      "turn on the light", "turn off" and "turn on"
           |  0   1   2    3    4       4 sees the prompt, 0 and itself, and has the position of 1

LLMs that cannot take such a mask (`takes_trees`) get a row for each candidate, with a prompt of its own. The head runs
once for each branch, and so twice where two tokens follow a node: as losses of targets its logits need not be kept.

Shape letters: B utterances, R rows of the LLM, T columns of a row, or tokens of a candidate, M candidates of all
utterances, N nodes that predict, E branches, L LLM width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .audio_llm import AudioLLM, SpeechOutput
from .decoding import Hypothesis
from .llm_scorer import attention_mask, takes_trees
from .prompt import AnswerTargets
from .target_losses import target_losses

PROMPT = -1  # the node before a tree's first one: the last position of the prompt


class Scored(NamedTuple):
    """Candidates run utterance by utterance, in the order given."""

    log_probs_MT: Tensor  # of a candidate's tokens and, where it is complete, its end token; float32 or better
    mask_MT: Tensor  # where it has these; elsewhere log_probs_MT is 0
    owner_M: Tensor  # the utterance of each candidate

    @property
    def sums_M(self) -> Tensor:
        """log P(y | x) of each candidate: the sum over its tokens, not their mean."""
        return self.log_probs_MT.sum(1)


def score_candidates(
    model: AudioLLM,
    speech: SpeechOutput,
    candidates: Sequence[Sequence[Hypothesis]],
    *,
    contexts_ids: list[list[int] | None] | None = None,
    languages: list[str | None] | None = None,
    trees: bool | None = None,
) -> Scored:
    """Score any number of candidates of each utterance under the weights as they are; their own scores are not read.

    One that was cut at its limit (`complete` False) is scored without an end token. `trees` None: where the LLM takes
    them. The gradient reaches everything that is trained, through `speech` the encoder too.
    """
    B, end, device = len(speech.lengths_B), model.prompt_tokens.end, speech.speech_BSL.device
    for name, given in (("lists of candidates", candidates), ("contexts", contexts_ids), ("languages", languages)):
        if given is not None and len(given) != B:
            raise ValueError(f"{B} utterances need as many {name}, found {len(given)}")
    spelled = [[[*h.ids, *[end] * h.complete] for h in of_one] for of_one in candidates]
    if takes_trees(model.llm) if trees is None else trees:
        rows = [(b, TokenTree(of_one)) for b, of_one in enumerate(spelled) if of_one]
    else:
        rows = [(b, TokenTree([one])) for b, of_one in enumerate(spelled) for one in of_one]
    # Without any candidates the LLM still runs, or ranks that have some would wait for this one's part of its weights.
    rows = rows or [(0, TokenTree([]))]
    branches, taken = _joined([tree for _, tree in rows])
    node_E, token_E = torch.tensor(branches, dtype=torch.long, device=device).view(-1, 2).unbind(1)
    log_probs_E = _log_probs(model, speech, rows, contexts_ids, languages, node_E=node_E, token_E=token_E)
    longest = max(map(len, taken), default=0)
    branch_MT = torch.tensor([t + [-1] * (longest - len(t)) for t in taken], dtype=torch.long, device=device)
    branch_MT = branch_MT.view(len(taken), longest)
    mask_MT = branch_MT >= 0
    return Scored(
        log_probs_MT=log_probs_E[branch_MT].masked_fill(~mask_MT, 0.0),
        mask_MT=mask_MT,
        owner_M=torch.tensor([b for b, of_one in enumerate(candidates) for _ in of_one], dtype=torch.long).to(device),
    )


class TokenTree:
    """Token sequences with their common beginnings joined.

    A branch is a token that follows a node. It leads to a node where something follows that token in turn.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]):
        self.tokens: list[int] = []  # of each node; a node comes after the one that it follows
        self.parents: list[int] = []
        self.depths: list[int] = []  # 0: right behind the prompt
        self.branches: dict[tuple[int, int], int] = {}  # (node, token that follows it) -> number
        self._leads_to: dict[int, int] = {}
        self.taken = [self._add(sequence) for sequence in sequences]  # the branches of each sequence

    def _add(self, sequence: Sequence[int]) -> list[int]:
        node, taken = PROMPT, []
        for depth, token in enumerate(sequence):
            branch = self.branches.setdefault((node, token), len(self.branches))
            taken.append(branch)
            if depth + 1 < len(sequence):
                if branch not in self._leads_to:
                    self._leads_to[branch] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.depths.append(depth)
                node = self._leads_to[branch]
        return taken

    @property
    def is_chain(self) -> bool:
        """Whether every node follows the one before it, as in a single sequence."""
        return self.depths == list(range(len(self.depths)))

    def seen(self) -> Tensor:
        """Return which nodes each node sees: those that it descends from, and itself."""
        seen_NN = torch.eye(len(self.tokens), dtype=torch.bool)
        of = seen_NN.numpy()  # row by row, torch would take ten times as long
        for node, parent in enumerate(self.parents):
            if parent != PROMPT:
                of[node] |= of[parent]
        return seen_NN


def _log_probs(
    model: AudioLLM,
    speech: SpeechOutput,
    rows: list[tuple[int, TokenTree]],
    contexts_ids: list[list[int] | None] | None,
    languages: list[str | None] | None,
    *,
    node_E: Tensor,
    token_E: Tensor,
) -> Tensor:
    """Return log_probs_E of each branch's token; nodes count row by row, a row's prompt before its nodes."""
    owners, trees, device = [b for b, _ in rows], [tree for _, tree in rows], speech.speech_BSL.device
    embeddings_RTL, lengths = model.embed(
        speech.of(torch.tensor(owners, device=device)),
        contexts_ids and [contexts_ids[b] for b in owners],
        languages and [languages[b] for b in owners],
        transcripts_ids=[tree.tokens for tree in trees],
    )
    prompts = [length - len(tree.tokens) for length, tree in zip(lengths, trees)]
    predicting = [(row, column) for row, start in enumerate(prompts) for column in range(start - 1, lengths[row])]
    row_N, column_N = torch.tensor(predicting, device=device).unbind(1)
    branching = {} if all(tree.is_chain for tree in trees) else _branching(model, trees, prompts, like=embeddings_RTL)
    targets = AnswerTargets(row_N[node_E], column_N[node_E], token_E)
    return -target_losses(model.llm, embeddings_RTL, targets, **branching).nll_N


def _branching(model: AudioLLM, trees: list[TokenTree], prompts: list[int], *, like: Tensor) -> dict[str, Tensor]:
    """Return mask and positions of rows in which nodes follow others than the one before."""
    device, (R, T, _) = like.device, like.shape
    column_T, start_R = torch.arange(T, device=device), torch.tensor(prompts, device=device)
    position_RT = column_T.repeat(R, 1)
    seen_RTT = (column_T <= column_T[:, None]) & (column_T < start_R[:, None, None])
    # Columns behind a row's end are never read; they see themselves, as attention to nothing at all could be NaN.
    seen_RTT |= torch.eye(T, dtype=torch.bool, device=device)
    for row, (tree, start) in enumerate(zip(trees, prompts)):
        nodes = slice(start, start + len(tree.tokens))
        position_RT[row, nodes] = torch.tensor(tree.depths, dtype=torch.long, device=device) + start
        seen_RTT[row, nodes, nodes] = tree.seen().to(device)
    return {"attention_mask": attention_mask(model.llm, seen_RTT), "position_ids": position_RT}


def _joined(trees: list[TokenTree]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Return the branches of all trees, as (which of the N predicts it, token), and the branches of each candidate."""
    branches: list[tuple[int, int]] = []
    taken, first = [], 0
    for tree in trees:
        taken += [[len(branches) + branch for branch in of_one] for of_one in tree.taken]
        branches += [(first + 1 + node, token) for node, token in tree.branches]
        first += len(tree.tokens) + 1
    return branches, taken
