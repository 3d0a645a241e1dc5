import numpy as np
import pytest
import torch
from tiny_experts import EXPERTS, INNER, NAME, WIDTH, make_experts, random_call

from seedling.quant.expert_inputs import ExpertCall
from seedling.quant.expert_layout import DOWN, GATE_UP
from seedling.quant.expert_problems import ALL_TOKENS, NO_TOKENS, OWN_TOKENS, expert_problems


def calls_of(seeds, *, n=40, **options):
    return [ExpertCall(*random_call(n, seed=seed, **options)[:2], batch=seed) for seed in seeds]


def problems(module, calls, projection=GATE_UP, **options):
    return list(expert_problems(module, calls, name=NAME, projection=projection, **options))


def rows_of(module, calls, projection, expert, *, everyone=False):
    """What one expert receives, in float64 numpy."""
    x = np.concatenate([c.hidden_nK[(c.index_nk == expert).any(1) | everyone].double().numpy() for c in calls])
    if projection == GATE_UP:
        return x
    gate, up = np.split(x @ module.gate_up_proj[expert].detach().double().numpy().T, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("memory_bytes", [1, 2 * 8 * WIDTH**2, 1 << 30])
@pytest.mark.parametrize("projection", [GATE_UP, DOWN])
def test_moments_are_those_of_each_experts_tokens_in_any_number_of_chunks(projection, memory_bytes):
    module, calls = make_experts("qwen3_moe"), calls_of(range(3))
    found = problems(module, calls, projection, memory_bytes=memory_bytes)
    assert [p.name for p in found] == [f"{NAME}.{projection}.{e}" for e in range(EXPERTS)]
    for problem in found:
        x = rows_of(module, calls, projection, problem.expert)
        assert problem.tokens == problem.moments.count == len(x) and problem.calibrated_on == OWN_TOKENS
        tolerance = 1e-12 if projection == GATE_UP else 1e-5  # the experts compute in float32
        np.testing.assert_allclose(problem.moments.mean_KK().numpy(), x.T @ x / len(x), rtol=tolerance, atol=tolerance)
        weight = module.gate_up_proj if projection == GATE_UP else module.down_proj
        assert torch.equal(problem.weight_NK, weight[problem.expert])


@pytest.mark.parametrize("projection", [GATE_UP, DOWN])
def test_an_expert_that_saw_too_few_tokens_is_calibrated_on_all_of_them(projection):
    module, calls = make_experts("mixtral"), calls_of(range(2), without=2)
    found = problems(module, calls, projection)
    assert [p.calibrated_on for p in found] == [OWN_TOKENS, OWN_TOKENS, ALL_TOKENS, OWN_TOKENS]
    x = rows_of(module, calls, projection, 2, everyone=True)
    assert found[2].tokens == 0 and found[2].moments.count == len(x) == 80
    np.testing.assert_allclose(found[2].moments.mean_KK().numpy(), x.T @ x / 80, rtol=1e-5, atol=1e-5)


def test_too_few_are_fewer_than_an_eighth_of_the_channels_unless_another_number_is_given():
    module, calls = make_experts("qwen3_moe"), calls_of([0], n=9)
    tokens = [p.tokens for p in problems(module, calls)]
    assert min(tokens) < WIDTH / 8 <= max(tokens)

    def own(**options):
        return [p.calibrated_on == OWN_TOKENS for p in problems(module, calls, **options)]

    assert own() == [n >= WIDTH / 8 for n in tokens]
    assert own(min_tokens=0) == [True] * EXPERTS and own(min_tokens=10) == [False] * EXPERTS


@pytest.mark.parametrize("projection", [GATE_UP, DOWN])
def test_without_any_valid_token_there_are_no_moments(projection):
    calls = [call._replace(valid_n=torch.zeros(40, dtype=torch.bool)) for call in calls_of([0])]
    for problem in problems(make_experts("gpt_oss"), calls, projection):
        assert problem.moments is None and problem.calibrated_on == NO_TOKENS and problem.tokens == 0


def test_an_infinite_activation_is_named():
    call = calls_of([7])[0]
    call.hidden_nK[3, 1] = float("inf")
    with pytest.raises(
        ValueError, match=rf"^{NAME}.gate_up.\d: its inputs hold NaN or infinity in calibration batch 7"
    ):
        problems(make_experts("qwen3_moe"), [call])


def test_two_ranks_get_the_problems_of_all_tokens():
    """Each rank in a thread of its own; what they sum is exchanged at a barrier."""
    from threading import Barrier, Thread

    module, calls, barrier, board = make_experts("qwen3_moe"), calls_of(range(4), without=1), Barrier(2), {}

    class Rank:
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def gather(self, value):
            board[self.rank] = value
            barrier.wait()
            values = [board[0], board[1]]
            barrier.wait()
            return values

        def sum_floats(self, values):
            return sum(self.gather(values))

    found = {}

    def run(rank):
        found[rank] = problems(module, calls[rank::2], DOWN, ranks=Rank(rank))

    threads = [Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = problems(module, calls, DOWN)
    for one, first, second in zip(alone, found[0], found[1], strict=True):
        assert (
            (one.tokens, one.calibrated_on)
            == (first.tokens, first.calibrated_on)
            == (second.tokens, second.calibrated_on)
        )
        assert torch.equal(first.moments.mean_KK(), second.moments.mean_KK())
        torch.testing.assert_close(first.moments.mean_KK(), one.moments.mean_KK(), rtol=1e-12, atol=1e-12)
    assert alone[0].moments.mean_KK().shape == (INNER, INNER)
