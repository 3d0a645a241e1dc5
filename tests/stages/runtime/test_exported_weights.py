"""The weights of a checkpoint are those that were trained, whatever ZeRO stage and number of ranks wrote them."""

import errno
from pathlib import Path

import pytest
import torch
from forked_jobs import ForkedJob
from safetensors import safe_open
from safetensors.torch import load_file
from toy_jobs import load_weights

from seedling.launch.cli import main
from seedling.stages.runtime import exported_weights
from seedling.stages.runtime.checkpoint import list_checkpoints
from seedling.stages.runtime.exported_weights import choose_checkpoint, write_weights

KINDS = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
    "bf16": {"zero_stage": 1, "precision": "bf16"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on two ranks, with checkpoints of steps 2 and 4."""
    settings = {kind: {"train": {"max_steps": 4, "save_every": 2, **train}} for kind, train in KINDS.items()}
    return ForkedJob(tmp_path_factory.mktemp("runs"), settings, ranks=2).finish().root


@pytest.mark.parametrize("kind", KINDS)
def test_the_newest_checkpoint_holds_what_was_trained(runs, tmp_path, kind):
    """Under bf16 it holds the masters: what the model computes with is those, rounded."""
    write_weights(choose_checkpoint(runs / kind), tmp_path / "out" / "model.safetensors")
    found, trained = load_file(tmp_path / "out" / "model.safetensors"), load_weights(runs / kind)
    assert set(found) == {name for name in trained if not name.startswith("frozen")}
    for name, value in found.items():
        assert value.dtype == torch.float32 and torch.equal(value.to(trained[name].dtype), trained[name]), name
    assert kind != "bf16" or any(not torch.equal(value, value.bfloat16().float()) for value in found.values())


def test_the_command_writes_a_folder_of_the_step_that_was_asked_for(runs, tmp_path, capsys):
    assert main(["export-checkpoint", str(runs / "zero3"), "--step", "2", "--out", str(tmp_path / "out")]) == 0
    assert "step_000002: 289 numbers of 4 tensors in fp32" in capsys.readouterr().out
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "2" and file.metadata()["stage"] == "toy"
        assert not torch.equal(file.get_tensor("head.weight"), load_weights(runs / "zero3")["head.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_where_the_disk_is_full_the_export_of_before_stays_and_nothing_else(runs, tmp_path, monkeypatch, name):
    checkpoint, out = choose_checkpoint(runs / "zero1"), tmp_path / "out" / name
    write_weights(checkpoint, out)

    def contents():
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    before = contents()

    def fill_the_disk(tensors, path, metadata=None):
        Path(path).write_bytes(b"torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exported_weights, "save_file", fill_the_disk)
    monkeypatch.setattr("safetensors.torch.save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_weights(checkpoint, out)
    assert before and contents() == before


def test_what_cannot_be_exported_is_one_line(runs, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; --step can be one of: 2, 4"):
        choose_checkpoint(runs / "zero1", step=3)
    with pytest.raises(ValueError, match=r"no whole checkpoint to export \(steps there: none\)"):
        choose_checkpoint(tmp_path)
    torn = list_checkpoints(runs / "zero2" / "checkpoints")[0]
    (torn / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"torn checkpoint \(state.json has 1 bytes.* choose another --step of: 2, 4"):
        choose_checkpoint(runs / "zero2", step=4)
    assert choose_checkpoint(runs / "zero2").name == "step_000002"
