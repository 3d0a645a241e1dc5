"""Live bytes, against sizes that are known and against the same code on real tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from seedling.stages.runtime.allocations import Allocations


def test_a_tensor_counts_until_it_is_freed_and_its_views_do_not_count():
    with Allocations() as memory:
        a = torch.zeros(1000)
        views = a[10:], a.view(10, 100), a.detach()
        assert memory.live == 4000
        b = torch.zeros(500, dtype=torch.bfloat16)
        assert memory.live == 5000
        del a, views
        assert memory.live == 1000
        del b
    assert memory.live == 0 and memory.peak == 5000


def test_what_lived_before_does_not_count():
    a = torch.zeros(1000)
    with Allocations([a]) as memory:
        b = a + 1
        a.add_(1)
        assert memory.live == 4000 and len(b) == 1000


def test_tensors_on_meta_take_nothing():
    with Allocations() as memory:
        shape = torch.zeros(1000, device="meta")
        assert memory.live == 0 and len(shape) == 1000


def test_the_peak_starts_anew_from_what_is_alive():
    with Allocations() as memory:
        kept, gone = torch.zeros(10), torch.zeros(1000)
        del gone
        assert memory.restart_peak() == 4040
        assert memory.restart_peak() == 40 and len(kept) == 10


def test_a_linear_layer_saves_its_input_for_the_gradient_of_the_weight():
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(100, 64)
    with Allocations([layer.weight, x]) as memory:
        h = x * 2  # saved: the weight's gradient is a product with it
        y = layer(h)
        del h
        assert memory.live == 4 * 100 * (64 + 32)
        del y
    layer.weight.requires_grad_(False)
    with Allocations([layer.weight, x]) as memory:
        y = layer(x * 2)
        assert memory.live == 4 * 100 * 32 and len(y) == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_take_what_real_ones_take(dtype):
    def peaks(fake: bool) -> tuple[int, int]:
        with torch.device("meta" if fake else "cpu"):
            model = nn.Sequential(nn.Linear(40, 80), nn.LayerNorm(80), nn.GELU(), nn.Dropout(0.1), nn.Linear(80, 7))
            model.to(dtype)
        if fake:
            with FakeTensorMode(allow_non_fake_inputs=True):
                model.to_empty(device="cpu")
        x = torch.randn(30, 40, dtype=dtype)
        with Allocations([x, *model.parameters()]) as memory:
            loss = model(x).float().log_softmax(-1).square().sum()
            forward = memory.restart_peak()
            loss.backward()
        return forward, memory.peak

    assert peaks(fake=True) == peaks(fake=False)
