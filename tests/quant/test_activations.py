"""Stored activations come back as they were, from memory or from files, whatever is written over them."""

from typing import NamedTuple

import pytest
import torch

from seedling.quant.activations import ActivationStore, Stored, StoredInputs, Surroundings, hidden_of, moved

BYTES = 4 * 6  # of one tensor


def values(count=4):
    return [torch.arange(6.0).reshape(2, 3) + 10 * number for number in range(count)]


@pytest.mark.parametrize("in_memory", range(5))
def test_what_is_put_comes_back_and_only_what_is_past_the_limit_lies_in_files(tmp_path, in_memory):
    store = ActivationStore(tmp_path / "folder", "some", limit_bytes=in_memory * BYTES + 1)
    for number, value in enumerate(values()):
        store.put(number, value)
    assert len(list(tmp_path.glob("folder/*.pt"))) == 4 - in_memory
    for number, value in enumerate(values()):
        assert torch.equal(store.get(number), value)


@pytest.mark.parametrize("in_memory", [0, 2, 4])
def test_what_is_put_again_takes_the_place_of_what_was_there(tmp_path, in_memory):
    store = ActivationStore(tmp_path, "some", limit_bytes=in_memory * BYTES)
    for _ in range(3):  # were the bytes of before still counted, the limit would be reached
        for number, value in enumerate(values()):
            store.put(number, -value)
    assert len(list(tmp_path.glob("*.pt"))) == 4 - in_memory
    assert all(torch.equal(store.get(number), -value) for number, value in enumerate(values()))


def test_a_view_is_stored_without_what_it_is_a_view_of(tmp_path):
    large = torch.zeros(1000, 1000)
    store = ActivationStore(tmp_path, "some", limit_bytes=0)
    store.put(0, large[:2, :3])
    (file,) = tmp_path.glob("*.pt")
    assert file.stat().st_size < 10_000


def test_clearing_deletes_the_files_of_this_store_alone(tmp_path):
    one, other = (ActivationStore(tmp_path, name, limit_bytes=0) for name in ("llm-full", "llm-quantised"))
    for store in (one, other):
        store.put(0, torch.ones(3))
    one.clear()
    assert [file.name for file in tmp_path.glob("*.pt")] == ["llm-quantised-000000.pt"]
    assert torch.equal(other.get(0), torch.ones(3))


def test_inputs_are_put_together_batch_by_batch_and_slices_keep_their_numbers(tmp_path):
    store = ActivationStore(tmp_path, "some", limit_bytes=2 * BYTES)
    numbers = [1, 3, 5]
    for number, value in zip(numbers, values()):
        store.put(number, value)
    around = [
        Surroundings((number,), {"mask": torch.tensor(number)}, torch.tensor([True, False])) for number in numbers
    ]
    inputs = StoredInputs(Stored(store, numbers, device="cpu"), around)
    assert len(inputs) == 3 and inputs.batches == numbers and inputs[1:].batches == [3, 5]
    for at, given in enumerate(inputs[1:]):
        assert torch.equal(given.args[0], values()[at + 1]) and given.args[1] == numbers[at + 1]
        assert given.kwargs["mask"] == numbers[at + 1] and given.valid_BT.tolist() == [True, False]


def test_nested_values_keep_their_types_and_a_tensor_met_twice_stays_one():
    class Pair(NamedTuple):
        a: object
        b: object

    x = torch.ones(2, requires_grad=True)
    found = moved({"pair": Pair(x, [x, (x, "text")]), "none": None}, "cpu", {})
    assert type(found["pair"]) is Pair and type(found["pair"].b) is list and found["none"] is None
    assert found["pair"].a is found["pair"].b[0] is found["pair"].b[1][0] and not found["pair"].a.requires_grad
    assert hidden_of((x, "rest")) is x and hidden_of(x) is x
