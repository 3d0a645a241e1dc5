"""Artifacts: whole or absent, checked when opened, walkable back to where they came from."""

import shutil

import pytest

from seedling.stages.runtime.artifacts import ArtifactSpec, ArtifactWriter, lineage, load_artifact, load_inputs


def write(target, *, kind="speech_encoder", inputs=None, content="weights", **facts):
    writer = ArtifactWriter(target, kind=kind, stage=f"make_{kind}", inputs=inputs or {}, facts=facts).start()
    (writer.path / "sub").mkdir()
    (writer.path / "sub" / "model.bin").write_text(content)
    return writer.finish()


def test_an_artifact_comes_back_as_written(tmp_path):
    written = write(tmp_path / "a", frame_hz=25.0)
    read = load_artifact(tmp_path / "a", kind="speech_encoder")
    assert read == written and read.facts == {"frame_hz": 25.0}
    assert list(read.manifest["files"]) == ["sub/model.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"], "nothing is left beside it"


def test_a_folder_without_a_manifest_does_not_exist(tmp_path):
    writer = ArtifactWriter(tmp_path / "a", kind="llm", stage="s").start()
    (writer.path / "model.bin").write_text("half")
    with pytest.raises(ValueError, match=r"a: no such artifact folder, wanted by the caller \(kind llm\)"):
        load_artifact(tmp_path / "a", kind="llm")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        load_artifact(writer.path)


def test_writing_again_replaces_the_old_artifact_whole(tmp_path):
    write(tmp_path / "a", content="old")
    write(tmp_path / "a", content="new")
    assert (load_artifact(tmp_path / "a").path / "sub/model.bin").read_text() == "new"


def test_the_wrong_kind_names_both_sides(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"kind 'speech_encoder' \(stage make_speech_encoder\), stage sft \(inputs.llm\) expects 'llm'"
    ):
        load_inputs({"llm": ArtifactSpec("llm")}, {"llm": str(tmp_path / "a")}, stage="sft")


@pytest.mark.parametrize("damaged", ["weightz", "weight", None])
def test_damage_is_found_and_named(tmp_path, damaged):
    write(tmp_path / "a")
    file = tmp_path / "a" / "sub" / "model.bin"
    file.unlink() if damaged is None else file.write_text(damaged)
    with pytest.raises(ValueError, match=r"damaged artifact: sub/model.bin .*run stage make_speech_encoder again"):
        load_artifact(tmp_path / "a")


def test_an_artifact_whose_input_was_replaced_is_refused_and_one_whose_input_is_gone_is_not(tmp_path):
    child = write(tmp_path / "b", kind="frame_labeler", inputs={"encoder": write(tmp_path / "a")})
    child.require_unchanged_inputs(wanted_by="stage encoder_pretrain")
    write(tmp_path / "a", content="other weights")
    said = (
        r"b: this frame_labeler was made from the encoder .*a as it was.*stage encoder_pretrain refuses it; run stage"
    )
    with pytest.raises(ValueError, match=said):
        load_artifact(tmp_path / "b").require_unchanged_inputs(wanted_by="stage encoder_pretrain")
    shutil.rmtree(tmp_path / "a")
    child.require_unchanged_inputs(wanted_by="stage encoder_pretrain")


def test_a_fact_that_disagrees_names_both_values(tmp_path):
    artifact = write(tmp_path / "a", frame_hz=25.0)
    artifact.require({"frame_hz": 25.0}, wanted_by="stage sft")
    with pytest.raises(ValueError, match=r"has frame_hz 25.0, stage sft expects 50.0"):
        artifact.require({"frame_hz": 50.0}, wanted_by="stage sft")


def test_inputs_missing_unknown_optional_and_foreign(tmp_path):
    consumes = {"encoder": ArtifactSpec("speech_encoder", required=False), "llm": ArtifactSpec("llm", foreign=True)}
    with pytest.raises(ValueError, match=r"needs inputs\.llm, an artifact of kind 'llm'"):
        load_inputs(consumes, {}, stage="sft")
    with pytest.raises(ValueError, match=r"inputs\.encodr='x': stage sft takes encoder, llm"):
        load_inputs(consumes, {"encodr": "x"}, stage="sft")
    (tmp_path / "hub_model").mkdir()
    opened = load_inputs(consumes, {"llm": str(tmp_path / "hub_model")}, stage="sft")
    assert list(opened) == ["llm"] and opened["llm"].kind == "llm" and opened["llm"].hash is None


def test_lineage_walks_to_the_beginning_and_says_where_it_breaks(tmp_path):
    llm = write(tmp_path / "llm", kind="llm")
    encoder = write(tmp_path / "encoder", kind="speech_encoder")
    sft = write(tmp_path / "sft", kind="acllm", inputs={"encoder": encoder, "llm": llm})
    write(tmp_path / "rl", kind="acllm", inputs={"acllm": sft})
    walked = [(a.depth, a.name, a.kind, a.problem) for a in lineage(tmp_path / "rl")]
    assert walked == [
        (0, "", "acllm", ""),
        (1, "acllm", "acllm", ""),
        (2, "encoder", "speech_encoder", ""),
        (2, "llm", "llm", ""),
    ]
    write(tmp_path / "llm", kind="llm", content="another")
    (tmp_path / "encoder" / "manifest.json").unlink()
    assert [a.problem for a in lineage(tmp_path / "rl")] == ["", "", "gone", "changed since it was used"]
