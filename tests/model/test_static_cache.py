"""A static cache holds what a tree cache holds, where it was before."""

import random

import pytest
import torch
from transformers.cache_utils import DynamicCache

from seedling.model.static_cache import StaticCache, StaticLayer, bucket
from seedling.model.tree_cache import TreeCache


def prompts(sizes: list[tuple[int, int]], *, seed: int = 0) -> list[DynamicCache]:
    """Two layers of 2 heads of width 3, for groups of so many rows and columns."""
    generator, groups = torch.Generator().manual_seed(seed), []
    for rows, columns in sizes:
        group = DynamicCache()
        for layer in range(2):
            keys, values = torch.randn(2, rows, 2, columns, 3, generator=generator)
            group.update(keys, values, layer)
        groups.append(group)
    return groups


def held(cache: TreeCache) -> list[torch.Tensor]:
    return [states[: layer.rows, :, : layer.columns] for layer in cache.layers for states in (layer.keys, layer.values)]


def addresses(cache: StaticCache) -> list[int]:
    return [states.data_ptr() for layer in cache.layers for states in (layer.keys, layer.values)]


def assert_equal(static: StaticCache, tree: TreeCache) -> None:
    assert (static.rows, static.columns) == (tree.rows, tree.columns)
    assert all(torch.equal(a, b) for a, b in zip(held(static), held(tree), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_it_holds_what_a_tree_cache_holds(seed):
    """Search after search, through every step that a search takes with its cache."""
    rng, static = random.Random(seed), None
    for search in range(4):
        groups = prompts([(rng.randint(1, 4), rng.randint(1, 40)) for _ in range(rng.randint(1, 3))], seed=search)
        tree = TreeCache(groups)
        if static is None:
            static = StaticCache(groups, room=3)
        else:
            static.load(groups, room=3)
        assert_equal(static, tree)
        for _ in range(5):
            rows = sorted(rng.sample(range(tree.rows), rng.randint(1, tree.rows)))
            assert static.keep(rows) == tree.keep(rows)
            assert_equal(static, tree)
            kept = rng.randint(1, tree.columns)
            columns_UT = torch.stack([torch.randperm(tree.columns)[:kept].sort().values for _ in range(tree.rows)])
            static.thin_out(columns_UT, room=5)
            tree.thin_out(columns_UT, room=5)
            assert_equal(static, tree)
            assert static.has_room(5)
            new, first = torch.randn(tree.rows, 2, 2, 3), static.append(2)
            for at, layer in enumerate(static.layers):
                seen = StaticLayer(layer.keys[: layer.rows], layer.values[: layer.rows], torch.arange(first, first + 2))
                seen.update(new, -new)
                tree.update(new, -new, at)
            assert_equal(static, tree)


def test_buffers_move_only_where_there_is_no_room_and_hold_no_rubbish():
    cache = StaticCache(prompts([(3, 10)]), room=20)
    before = addresses(cache)
    cache.load(prompts([(2, 30), (1, 4)]), room=20)
    cache.thin_out(torch.arange(8).expand(3, 8), room=20)
    assert addresses(cache) == before
    cache.load(prompts([(3, 60)]), room=20)
    assert addresses(cache) != before and cache.layers[0].keys.shape[0] == 3, "a wider one is as tall as before"
    assert all(torch.isfinite(states).all() for layer in cache.layers for states in (layer.keys, layer.values))
    narrow = addresses(cache)
    cache.thin_out(torch.arange(60).expand(3, 60), room=200)
    assert addresses(cache) != narrow and cache.has_room(200)


def test_buckets_are_at_least_as_large_and_at_most_a_quarter_larger():
    for size in range(1, 2000):
        assert size <= bucket(size) <= 1.25 * size
        assert size <= bucket(size, least=64) < size + max(64, size / 4) and bucket(size, least=64) % 64 == 0
    assert len({bucket(size) for size in range(1, 65)}) <= 8 + 4 * 3
    assert all(bucket(bucket(size)) == bucket(size) for size in range(1, 2000))
