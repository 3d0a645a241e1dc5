"""The command line as its users meet it: real processes, exit codes, and one line on stderr for their mistakes."""

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from seedling.launch.cli import main, parse
from seedling.launch.commands.artifacts import expand
from seedling.launch.errors import report_errors
from seedling.launch.stage_lookup import find_config, load_stage

HERE = Path(__file__).parent
COMMANDS = [
    "prepare",
    "contextualize",
    "index",
    "check-data",
    "show",
    "check",
    "run",
    "pipeline",
    "evaluate",
    "tune-decoding",
    "transcribe",
    "inspect",
    "export-checkpoint",
]
# In front of what is there: a checkout that is only on the path must not be tested with another one's processes.
PATHS = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
PATIENCE = 600  # seconds for what takes twenty on a machine that has nothing else to do


def seedling(*arguments, cwd, environment=ENVIRONMENT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "seedling.launch.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def errors_of(ended: subprocess.CompletedProcess) -> list[str]:
    return [line for line in ended.stderr.splitlines() if line.startswith("seedling")]


def test_help_lists_every_command_and_imports_nothing_heavy(tmp_path):
    probe = (
        "import sys; from seedling.launch.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print([name for name in ('torch', 'numpy', 'omegaconf', 'transformers') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert all(f"\n    {command}" in ended.stdout for command in COMMANDS)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_overrides_may_stand_before_between_and_after_options():
    arguments = parse(["run", "sft", "a=1", "--config", "f.yaml", "b=2", "--nproc", "2", "c=3"])
    assert arguments.overrides == ["a=1", "b=2", "c=3"] and arguments.nproc == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["runs"], "invalid choice: 'runs'"),
        (["run", "sft", "--nprocs", "two"], "--nproc"),
        (["run", "sft", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["pipeline"], "PIPELINE"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and said in error and "--help" in error


def raising(error: Exception):
    def action():
        raise error

    return action


@pytest.mark.parametrize("error", [ValueError("two\nlines"), FileNotFoundError(2, "No such file", "x.yaml")])
def test_mistakes_of_the_user_are_one_line_and_exit_2(capsys, error):
    assert report_errors(raising(error)) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.startswith("seedling: error: ")


def test_bugs_keep_their_traceback():
    with pytest.raises(RuntimeError):
        report_errors(raising(RuntimeError("ours")))


def test_run_writes_artifact_and_resolved_config_and_show_reads_it_back(tmp_path):
    (tmp_path / "c.yaml").write_text("number: 3\nrun_dir: runs/c\n")
    ended = seedling("run", "toy_stages:Count", "--config", "c.yaml", "number=4", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs/c/artifact/number.txt").read_text() == "4"
    text = (tmp_path / "runs/c/config.yaml").read_text()
    assert yaml.safe_load(text)["number"] == 4 and "stage: toy_stages:Count" in text
    shown = seedling("show", "toy_stages:Count", "--config", "runs/c/config.yaml", cwd=tmp_path)
    assert yaml.safe_load(shown.stdout) == yaml.safe_load(text)
    line = next(line for line in shown.stdout.splitlines() if line.startswith("number:"))
    assert line.split() == ["number:", "4", "#", "runs/c/config.yaml"]
    inspected = seedling("inspect", "runs/c", cwd=tmp_path)
    assert inspected.returncode == 0, inspected.stderr
    assert "metric  number: 4" in inspected.stdout and "count of stage toy_stages:Count" in inspected.stdout
    checked = seedling("check", "toy_stages:Count", "run_dir=x", "inputs.first=runs/c/artifact", cwd=tmp_path)
    assert checked.returncode == 0 and "input first: runs/c/artifact (count)" in checked.stdout
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["run_dir=r", "numbr=1"], "override numbr=1: unknown key; nearest valid key: number"),
        (["run_dir=r", "number=x"], "override number=x: expected int, found str"),
        (["run_dir=r", "number=-1"], "number (-1) must not be negative"),
        (["run_dir=r", "train.max_steps=1"], "override train.max_steps=1: unknown key"),  # it trains nothing
        (["run_dir=r", "inputs.frist=a"], "nearest: inputs.first"),
        (["run_dir=r", "--nproc", "0"], "--nproc is 0"),
        ([], "run_dir is not set; give it in the file or as run_dir=VALUE (str)"),
    ],
)
def test_a_mistake_in_a_config_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, overrides, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    assert main(["run", "toy_stages:Count", *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert not list(tmp_path.iterdir())


def test_a_missing_input_is_found_by_check_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    assert main(["check", "toy_stages:Count", "run_dir=r", "inputs.first=nowhere"]) == 2
    assert "nowhere: no such artifact folder" in capsys.readouterr().err


def test_a_mistake_found_while_running_is_one_line_and_exit_2(tmp_path):
    ended = seedling("run", "toy_stages:Count", "run_dir=r", "fail=mistake", cwd=tmp_path)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert errors_of(ended) == ["seedling: error: this input cannot be counted"]


def test_debug_shows_the_traceback_of_a_mistake_and_bugs_always_have_one(tmp_path):
    debug = {**ENVIRONMENT, "SEEDLING_DEBUG": "1"}
    arguments = ["run", "toy_stages:Count", "run_dir=r"]
    mistake = seedling(*arguments, "fail=mistake", cwd=tmp_path, environment=debug)
    assert mistake.returncode == 2 and "Traceback" in mistake.stderr
    bug = seedling(*arguments, "fail=bug", cwd=tmp_path)
    assert bug.returncode == 1 and "RuntimeError: a bug" in bug.stderr and "Traceback" in bug.stderr


def test_a_config_for_another_stage_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("stage: sft\nrun_dir: r\n")
    ended = seedling("show", "toy_stages:Count", "--config", "c.yaml", cwd=tmp_path)
    assert ended.returncode == 2 and "c.yaml: stage = sft" in ended.stderr


def test_two_ranks_run_through_the_launcher_and_a_failing_rank_fails_the_run(tmp_path):
    arguments = ["run", "toy_stages:Count", "run_dir=runs/two words", "--nproc", "2", "text='a = b'"]
    ended = seedling(*arguments, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs/two words/artifact/world.txt").read_text() == "2"
    assert yaml.safe_load((tmp_path / "runs/two words/config.yaml").read_text())["text"] == "a = b"
    failed = seedling(*arguments, "fail=rank1", cwd=tmp_path)
    assert failed.returncode == 7


def test_a_request_to_stop_reaches_every_rank_and_their_exit_code_comes_back(tmp_path):
    command = [sys.executable, "-m", "seedling.launch.cli", "run", "toy_stages:Count", "run_dir=r", "--nproc", "2"]
    with subprocess.Popen([*command, "fail=stop", "sleep_seconds=3600"], cwd=tmp_path, env=ENVIRONMENT) as run:
        try:
            deadline = time.monotonic() + PATIENCE
            while len(list(tmp_path.glob("r/ready*"))) < 2:
                assert time.monotonic() < deadline and run.poll() is None
                time.sleep(0.1)
            run.terminate()
            assert run.wait(timeout=PATIENCE) == 75
        finally:
            run.kill()
    assert sorted(path.name for path in tmp_path.glob("r/stopped*")) == ["stopped0", "stopped1"]


def test_two_runs_cannot_share_a_folder(tmp_path):
    command = [sys.executable, "-m", "seedling.launch.job", "toy_stages:Count", "run_dir=r"]
    first = subprocess.Popen([*command, "sleep_seconds=3600"], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "r/config.yaml").exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)
        second = subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert second.returncode == 2 and f"process {first.pid} on " in second.stderr
    finally:
        first.kill()
        first.wait()
    third = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert third.returncode == 0, third.stderr


def test_stages_are_found_by_name_and_by_module(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    assert load_stage("toy_stages:Count").produces == "count"
    with pytest.raises(ValueError, match="did you mean evaluate"):
        load_stage("evalute")
    with pytest.raises(ValueError, match="no module toy_stagez; put its folder on PYTHONPATH"):
        load_stage("toy_stagez:Count")
    for name in ("NoConfig", "NoTrain"):
        with pytest.raises(ValueError, match="no Config that extends TrainingStageConfig"):
            load_stage(f"toy_stages:{name}")


def test_configs_are_found_beside_the_caller_then_by_path_then_by_packaged_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside").mkdir()
    (tmp_path / "a.yaml").touch()
    (tmp_path / "beside/a.yaml").touch()
    assert find_config("a", folder="stages") == Path("a.yaml")
    assert find_config("a.yaml", folder="stages", beside=Path("beside")) == Path("beside/a.yaml")
    with pytest.raises(FileNotFoundError, match="nor a packaged config of this name"):
        find_config("no_such_pipeline", folder="pipelines")


def test_patterns_become_files_and_what_matches_nothing_is_kept_to_be_named(tmp_path):
    for name in ("b.wav", "a.wav"):
        (tmp_path / name).touch()
    pattern = str(tmp_path / "*.wav")
    assert expand([pattern, "missing.wav"]) == [str(tmp_path / "a.wav"), str(tmp_path / "b.wav"), "missing.wav"]


def test_prepared_audio_passes_check_data_and_a_broken_shard_exits_1_naming_it(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 16000)
    lines = []
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", np.roll(noise, i * 1000), 16000)
        lines.append(f'{{"audio_filepath": "{i}.wav", "duration": 1.0, "text": "number {i} please"}}\n')
    (tmp_path / "m.jsonl").write_text("".join(lines))
    prepared = seedling("prepare", "m.jsonl", "--out", "shards", "--jobs", 1, cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    assert "3 utterances" in prepared.stdout
    good = seedling("check-data", "shards", "--jobs", 1, cwd=tmp_path)
    assert good.returncode == 0, good.stdout + good.stderr
    shard = next((tmp_path / "shards").glob("*.tar"))
    with tarfile.open(shard) as tar:
        member = next(member for member in tar if member.name.endswith(".flac"))
    with shard.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(b"\0" * 64)
    bad = seedling("check-data", "shards", "--jobs", 1, cwd=tmp_path)
    assert bad.returncode == 1
    problems = [line.split("\t") for line in bad.stdout.splitlines()]
    assert all(len(problem) == 3 and problem[2] for problem in problems)
    assert any(shard.name in name and key == member.name.removesuffix(".flac") for name, key, _ in problems)


@pytest.mark.parametrize("command", ["index", "check-data", "inspect", "pipeline"])
def test_a_missing_folder_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main([command, "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nowhere" in error
