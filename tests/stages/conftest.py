"""What the stages' tests share: a spoken toy corpus, a small LM and a recogniser that has learnt the corpus by heart.

Each is made once, by the real stages (tiny_runs.py says how). Tests read them and write elsewhere.
"""

from pathlib import Path

import pytest
import tiny_runs


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Twelve sentences, each four times, with other noise each time."""
    return [text for text in tiny_runs.sentences(12, seed=1) for _ in range(4)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory, texts) -> Path:
    """48 utterances, half a minute of speech, in three shards."""
    return tiny_runs.make_shards(tmp_path_factory.mktemp("corpus"), texts)


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory) -> Path:
    """An untrained LLM, where it does not matter what the LLM knows."""
    return tiny_runs.make_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def lm_run(tmp_path_factory) -> Path:
    """The run of lm_pretrain on other sentences of the toy language."""
    folder = tmp_path_factory.mktemp("lm")
    for name, seed in (("text", 2), ("valid", 3)):
        (folder / f"{name}.txt").write_text("\n".join(tiny_runs.sentences(300 if seed == 2 else 60, seed=seed)))
    text = (f"text=[{folder}/text.txt]", f"valid_text=[{folder}/valid.txt]")
    return tiny_runs.train("lm_pretrain", folder / "run", tiny_runs.LM, *text)


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory, shards, lm_run) -> Path:
    """The run of sft that learnt the corpus by heart."""
    data = (f"data.train=[{shards}]", f"data.valid.dev={shards}", f"inputs.llm={lm_run}/artifact")
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    return tiny_runs.train("sft", run_dir, tiny_runs.SFT, *data, *tiny_runs.BY_HEART)
