"""Imports point downwards, as CONTRIBUTING.md and the folders promise: read from the source, without importing it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {
    "kernels": 0,
    "model": 1,
    "data": 1,
    "quant": 2,
    "stages.runtime": 3,
    "stages.recogniser": 4,
    "stages.reinforcement": 4,
    "stages": 5,
    "launch": 6,
    "seedling": 7,
}
# Narrower than the floors: these would be downwards, and are still not wanted.
FORBIDDEN = {
    ("stages.runtime", "model"): "the runtime sees nn.Module and batches only",
    ("stages.runtime", "quant"): "the runtime sees nn.Module and batches only",
    ("stages.runtime", "kernels"): "the runtime sees nn.Module and batches only",
    ("quant", "data"): "quant takes an iterator of calibration batches",
    ("data", "kernels"): "data delivers waveforms; kernels belong to models",
}


def folder_of(module: str) -> str:
    """`stages.runtime.config` lies in stages.runtime, `model.conformer` in model, the package itself in seedling."""
    room = ".".join(module.split(".")[:2])
    return room if room in FLOORS else (module.split(".")[0] or "seedling")


def imported(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Yield what a module of ours imports of ours, as names below `seedling` ("" is the package itself)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "seedling")
        elif isinstance(node, ast.ImportFrom) and node.level:
            parts = ["seedling", *module.split(".")] if module else ["seedling"]
            here = parts if is_package else parts[:-1]
            base = here[: len(here) - (node.level - 1)]
            target = ".".join([*base[1:], *([node.module] if node.module else [])])
            yield from [target] if node.module else [f"{target}.{alias.name}".strip(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "seedling":
            yield node.module


def complaints(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return every import of `module` that points the wrong way, and why."""
    found = []
    own = folder_of(module)
    for target in imported(source, module, is_package=is_package):
        if target.split(".")[0] == "seedling":
            found.append(f"{module} imports {target}: inside the package imports are relative")
            continue
        other = folder_of(target)
        if other not in FLOORS or target in ("", "__version__"):
            if target not in ("", "__version__") and not (target == "configs" and own == "launch"):
                found.append(f"{module} imports {target}: no floor has that name")
        elif (own, other) in FORBIDDEN:
            found.append(f"{module} imports {target}: {FORBIDDEN[own, other]}")
        elif other != own and FLOORS[other] >= FLOORS[own]:
            found.append(f"{module} (floor {FLOORS[own]}) imports {target} (floor {FLOORS[other]}): only downwards")
        elif own == other == "stages" and target != "stages" and not is_package:
            found.append(f"{module} imports {target}: stages do not import each other; what two need moves down")
    return found


def sources() -> list[tuple[Path, str]]:
    """Every file of the package with its name below `seedling`."""
    folders = [ROOT / name for name in ("kernels", "model", "data", "quant", "stages", "launch", "seedling")]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    assert len(files) > 40, "the folders of the package have moved"
    named = []
    for file in files:
        parts = list(file.relative_to(ROOT).with_suffix("").parts)
        parts = parts[1:] if parts[0] == "seedling" else parts
        named.append((file, ".".join(part for part in parts if part != "__init__")))
    return named


def test_every_import_points_downwards():
    found = []
    for file, module in sources():
        found += complaints(file.read_text(encoding="utf-8"), module, is_package=file.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "module, line",
    [
        ("model.conformer", "from ..data.audio import read_audio"),
        ("data.loader", "from ..model import features"),
        ("data.scoring.files", "from ...model.features import Fbank"),
        ("model.llm", "def f():\n    from ..stages.runtime.world import World"),
        ("stages.sft", "from .lm_pretrain import LMPretrain"),
        ("stages.sft", "from . import evaluate"),
        ("stages.recogniser.training", "from ..sft import SFT"),
        ("stages.runtime.trainer", "from ..recogniser.training import RecogniserTraining"),
        ("stages.runtime.trainer", "from ..reinforcement.workers import Workers"),
        ("stages.reinforcement.workers", "from ..recogniser.training import RecogniserTraining"),
        ("stages.runtime.trainer", "from ...model.conformer import ConformerEncoder"),
        ("stages.runtime.trainer", "from ..sft import SFT"),
        ("quant.solve", "from ..data.loader import AudioBatch"),
        ("kernels.rope", "from .. import model"),
        ("stages.sft", "from ..launch.cli import main"),
        ("model.llm", "import seedling.model.conformer"),
        ("model.llm", "from seedling.model import conformer"),
        ("data.plan", "from ..launhc import cli"),
    ],
)
def test_a_wrong_import_would_be_found(module, line):
    assert len(complaints(line, module)) == 1


@pytest.mark.parametrize(
    "module, line",
    [
        ("model.audio_llm", "from .conformer import ConformerEncoder"),
        ("data.scoring.report", "from ..audio import read_audio"),
        (
            "stages.sft",
            "from ..model.audio_llm import AudioLLM\nfrom ..data import loader\nfrom .runtime.stage import StepOutput",
        ),
        ("stages.context_sft", "from .recogniser.training import RecogniserTraining"),
        (
            "stages.recogniser.training",
            "from ...model.audio_llm import AudioLLM\nfrom ..runtime.stage import StepOutput",
        ),
        ("stages.runtime.artifacts", "from ... import __version__"),
        ("launch.stage_lookup", "from .. import configs\nfrom ..stages import STAGES"),
        ("model.llm", "import torch\nfrom transformers import AutoModel"),
    ],
)
def test_a_right_import_is_not_complained_about(module, line):
    assert complaints(line, module) == []


def test_no_stage_hides_a_module_of_the_standard_library():
    import sys

    hidden = [
        module for _, module in sources() if module.startswith("stages.") and module[7:] in sys.stdlib_module_names
    ]
    assert not hidden
