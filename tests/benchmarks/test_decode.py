"""The benchmark of packed recognisers compares ways that write the same, and would notice one that does not."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from packed_layers import make_recogniser, pack_all

from seedling.model.audio_llm import acllm_facts
from seedling.model.conformer import ConformerConfig
from seedling.quant.hf import declare_packed
from seedling.stages.runtime.artifacts import ArtifactWriter

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "decode.py"
VARIANTS = ["dense", "packed", "packed, half unpacked", "packed, unpacked"]


@pytest.fixture(scope="module")
def benchmark():
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("decode", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["decode"] = module
    spec.loader.exec_module(module)
    encoder = ConformerConfig(dim=16, num_layers=1, num_heads=2, conv_kernel=3, subsampling_channels=4, dropout=0.0)
    module.SIZES["tiny"] = module.Size(encoder, 1, 64, 2, 1200)
    yield module
    del sys.modules["decode"]
    torch.set_num_threads(threads)


def rows_of(benchmark, monkeypatch, out: Path, *arguments) -> tuple[int, list[dict]]:
    monkeypatch.setattr(sys, "argv", ["decode.py", "--device", "cpu", "--out", str(out), *map(str, arguments)])
    code = benchmark.main()
    return code, [json.loads(line) for line in out.read_text().splitlines()]


def test_random_recognisers_write_the_same_by_every_path(benchmark, monkeypatch, tmp_path):
    few = ("--utterances", 2, "--rounds", 1, "--beams", 2)
    code, rows = rows_of(
        benchmark, monkeypatch, tmp_path / "rows", "--sizes", "tiny", *few, "--dtypes", "float32", "bfloat16"
    )
    assert code == 0 and [row["impl"] for row in rows] == 2 * VARIANTS and {row["same"] for row in rows} == {1.0}
    assert all(row["tokens_per_second"] > 0 and row["rtf"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.fixture(scope="module")
def run_and_data(tmp_path_factory) -> tuple[Path, Path]:
    model = make_recogniser()
    pack_all(model)
    declare_packed(model)
    model.config.decode = {"beam_size": 2, "max_new_tokens": 8}
    run = tmp_path_factory.mktemp("run")
    writer = ArtifactWriter(run / "artifact", kind="acllm", stage="quantize").start()
    model.save_pretrained(writer.path)
    writer.facts |= acllm_facts(model)
    writer.finish()
    return run, tiny_runs.make_shards(tmp_path_factory.mktemp("corpus"), tiny_runs.sentences(5, seed=1))


def test_a_finished_recogniser_says_of_a_corpus_what_its_dequantised_twin_says(
    benchmark, monkeypatch, tmp_path, run_and_data
):
    run, data = run_and_data
    code, rows = rows_of(benchmark, monkeypatch, tmp_path / "rows", "--run", run, "--data", data)
    assert code == 0 and [row["impl"] for row in rows] == VARIANTS
    assert {(row["same"], row["utterances"], row["beams"]) for row in rows} == {(1.0, 5, 2)}


def test_a_twin_that_says_something_else_is_noticed(benchmark, monkeypatch, tmp_path, capsys, run_and_data):
    def other(model):
        twin = copy.deepcopy(model)
        twin.llm.get_output_embeddings().weight.data.neg_()
        return twin

    monkeypatch.setattr(benchmark, "twin_of", other)
    run, data = run_and_data
    code, rows = rows_of(benchmark, monkeypatch, tmp_path / "rows", "--run", run, "--data", data)
    assert code == 1 and rows[1]["same"] < 1
    assert "packed: " in capsys.readouterr().err
