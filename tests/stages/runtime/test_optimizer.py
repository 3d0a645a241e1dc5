"""Muon against the singular value decomposition and torch.optim.Muon; its other half against torch's AdamW."""

import copy

import pytest
import torch
from torch import nn

from seedling.stages.runtime.optimizer import NEWTON_SCHULZ_STEPS, Muon, make_optimizer, orthogonalize, split_groups
from seedling.stages.runtime.train_config import TrainConfig


class Stack(nn.Module):
    """An embedding, two layers with a matrix, a filter and a vector each, and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Conv1d(6, 6, 1)) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        x = self.embedding(ids)
        for linear, conv in self.layers:
            x = torch.tanh(conv(linear(x).mT).mT)
        return self.head(x)


def groups_of(model):
    return [{"params": list(model.parameters()), "name": "all", "lr": 0.0, "weight_decay": 0.1}]


def train(model, optimizer, *, steps, first=0, lr=0.02):
    for step in range(first, first + steps):
        ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
        model(ids).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = lr / (step + 1)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (3, 5, 5), (2, 40, 16), (2, 16, 40), (1, 64, 192)])
def test_orthogonalizing_keeps_the_singular_vectors_and_evens_out_the_values(shape):
    torch.manual_seed(0)
    u, s, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1.0, 0.2, s.shape[-1], dtype=torch.float64).expand_as(s)
    found = orthogonalize((u * s[..., None, :]) @ vt)
    values = u.mT @ found @ vt.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4, "the singular vectors turned"
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3, diagonal


def test_a_zero_gradient_stays_zero():
    assert orthogonalize(torch.zeros(2, 3, 4)).abs().max() == 0


def test_a_step_equals_torchs_muon_in_float32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t.float().clone())  # what torch's iteration starts with
    torch.manual_seed(1)
    ours, theirs = Stack(), Stack()
    theirs.load_state_dict(ours.state_dict())
    hidden = [layer[0].weight for layer in theirs.layers]
    others = [p for p in theirs.parameters() if all(p is not h for h in hidden)]
    reference = [
        torch.optim.Muon(
            hidden, lr=0.02, weight_decay=0.1, ns_steps=NEWTON_SCHULZ_STEPS, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=0.02, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-8),
    ]
    optimizer = Muon(split_groups(ours, groups_of(ours)), betas=(0.9, 0.98), eps=1e-8)
    for step in range(3):
        ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            model(ids).square().sum().backward()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            q.grad.copy_(p.grad)  # so that the difference is the update's alone
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        for each in (optimizer, *reference):
            each.step()
            each.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_only_matrices_within_layers_take_muons_step():
    model = Stack()
    parts = split_groups(model, groups_of(model))
    muon = [p for part in parts if part["muon"] for p in part["params"]]
    assert [p.data_ptr() for p in muon] == [layer[0].weight.data_ptr() for layer in model.layers]
    assert sum(len(part["params"]) for part in parts) == len(list(model.parameters()))
    assert all(part["name"] == "all" and part["weight_decay"] == 0.1 for part in parts)


def test_going_on_from_a_saved_state_is_bit_identical():
    torch.manual_seed(2)
    model = Stack()
    cfg = TrainConfig(max_steps=1, optimizer="muon")
    optimizer = make_optimizer(model, groups_of(model), cfg)
    train(model, optimizer, steps=3)
    resumed = copy.deepcopy(model)
    again = make_optimizer(resumed, groups_of(resumed), cfg)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed, again)):
        train(m, o, steps=3, first=3)
    for (name, p), q in zip(model.named_parameters(), resumed.parameters()):
        assert torch.equal(p, q), name


def test_a_step_without_gradients_changes_nothing():
    model = Stack()
    optimizer = make_optimizer(model, groups_of(model), TrainConfig(max_steps=1, optimizer="muon"))
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_muon_without_a_matrix_to_step_is_refused():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"train\.optimizer=adamw"):
        make_optimizer(model, groups_of(model), TrainConfig(max_steps=1, optimizer="muon"))


@pytest.mark.parametrize("setting", [{"zero_stage": 1}, {"precision": "bf16"}, {"zero_stage": 3}])
def test_muon_is_refused_where_matrices_are_cut_up(setting):
    with pytest.raises(ValueError, match=r"train\.zero_stage=0"):
        TrainConfig(max_steps=1, optimizer="muon", **setting)
