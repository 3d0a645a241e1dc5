"""What the searches are tested with on language models of random weights: prompts, and an end that they reach."""

import torch

END = 1


def prompts_of(llm, lengths: list[int], *, seed: int = 0) -> list[torch.Tensor]:
    """Return random prompts of these lengths, as embeddings."""
    generator = torch.Generator().manual_seed(seed)
    table = llm.get_input_embeddings().weight.detach()
    return [table[torch.randint(2, 300, (n,), generator=generator)] for n in lengths]


def make_end_likely(llm, *, by: float) -> None:
    """Random models hardly ever end: raise the end token's logit, so that hypotheses of all lengths finish."""
    head = llm.get_output_embeddings()
    bias = torch.zeros(head.out_features)
    bias[END] = by
    head.bias = torch.nn.Parameter(bias)
