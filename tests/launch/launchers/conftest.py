"""A working folder with a stage's config and a pipeline of toy stages, for launchers."""

from pathlib import Path

import pytest

TOYS = Path(__file__).parents[1]
PIPELINE = """
name: toy
run_dir: runs/toy
steps:
  - {name: shards, command: prepare, args: [m.jsonl]}
  - {name: spread, stage: "toy_stages:Count", set: {text: "it's $(a) \\"b\\""}}
  - {name: alone, stage: "toy_stages:Count", nproc: 2, inputs: {first: "${spread}"}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TOYS))
    Path("count.yaml").write_text("stage: toy_stages:Count\nrun_dir: runs/count\n")
    Path("toy.yaml").write_text(PIPELINE)
    return tmp_path
