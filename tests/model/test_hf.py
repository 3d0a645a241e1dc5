"""Registration with transformers' Auto classes, in fresh processes: which package comes first must not matter."""

import subprocess
import sys

import pytest

LOAD = """
import torch
model = AutoModel.from_pretrained({folder!r}).eval()
processor = AutoProcessor.from_pretrained({folder!r})
assert type(AutoConfig.from_pretrained({folder!r})).__name__ == "AudioLLMConfig"
inputs = processor(audio=[0.1 * torch.randn(8000)], sampling_rate=16000)
# Nothing of the detour is left: neither the finder nor a foreign loader.
import sys, transformers.models.auto.modeling_auto as modeling_auto
assert not [f for f in sys.meta_path if type(f).__module__ == "seedling.model.hf"]
assert type(modeling_auto.__spec__.loader).__name__ == "SourceFileLoader"
print(type(model).__name__, type(processor).__name__, len(processor.batch_decode(model.generate(**inputs))))
"""
ORDERS = [
    "import seedling\nfrom transformers import AutoModel, AutoProcessor, AutoConfig",
    "from transformers import AutoModel, AutoProcessor, AutoConfig\nimport seedling",
    "import seedling\nfrom transformers import AutoConfig\nfrom transformers import AutoProcessor, AutoModel",
    "import seedling.model.audio_llm\nfrom transformers import AutoModel, AutoProcessor, AutoConfig",
]


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("imports", ORDERS)
def test_auto_classes_load_an_artifact_in_any_import_order(imports, tmp_path, tiny_audio_llm):
    tiny_audio_llm("qwen2").save_pretrained(tmp_path)
    done = run(imports + LOAD.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["AudioLLM", "AudioLLMProcessor", "1"]


def test_importing_seedling_imports_neither_torch_nor_transformers_and_is_quick():
    # The time that counts is the import's own, not that of starting Python on a busy machine.
    done = run(
        "import sys, time; t = time.process_time(); import seedling; print(time.process_time() - t);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import seedling

    with pytest.raises(AttributeError, match="no_such_name"):
        seedling.no_such_name  # noqa: B018
