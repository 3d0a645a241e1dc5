import torch
from tiny_experts import EXPERTS, TOP_K, random_call

from seedling.quant.expert_routing import route


def pairs(routing):
    """expert -> [(token, slot)]"""
    parts = [x.split(routing.counts) for x in (routing.tokens_S, routing.slots_S)]
    return {e: list(zip(t.tolist(), s.tolist())) for e, t, s in zip(routing.experts, *parts)}


def expected(index_nk, valid=lambda token: True):
    found = {}
    for token, choices in enumerate(index_nk.tolist()):
        for slot, expert in enumerate(choices):
            if expert < EXPERTS and valid(token):
                found.setdefault(expert, []).append((token, slot))
    return dict(sorted(found.items()))


def test_every_expert_gets_its_tokens_in_order():
    _, index_nk, _ = random_call(37)
    routing = route(index_nk, experts=EXPERTS)
    assert pairs(routing) == expected(index_nk) and routing.experts == sorted(routing.experts)
    assert sum(routing.counts) == 37 * TOP_K


def test_padding_and_the_experts_of_others_go_nowhere_and_an_expert_may_be_missing():
    _, index_nk, _ = random_call(37, without=2)
    index_nk[5:9, 0] = EXPERTS
    valid_n = torch.arange(37) % 3 > 0
    routing = route(index_nk, experts=EXPERTS, valid_n=valid_n)
    assert pairs(routing) == expected(index_nk, lambda token: token % 3 > 0) and 2 not in routing.experts


def test_no_token_is_no_route():
    routing = route(torch.zeros(3, 2, dtype=torch.int64), experts=4, valid_n=torch.zeros(3, dtype=torch.bool))
    assert routing.experts == [] and len(routing.tokens_S) == 0
