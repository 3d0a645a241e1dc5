"""The wheel holds the package, its configs and nothing else, and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(*command, cwd: Path, **environment) -> str:
    ended = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves build/ behind, and what an older build left there would be packed again."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "wandb", "*.egg-info", "__pycache__", "tests", "shared", "venv"
    )
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, folder / "source"]
    call(*build, cwd=folder)
    return next(folder.glob("seedling-*.whl"))


def test_the_wheel_holds_every_module_and_config_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"seedling"}
    shipped = {name.removeprefix("seedling/") for name in names}
    for folder in ("kernels", "model", "data", "quant", "stages", "launch", "configs"):
        for file in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")]:
            assert str(file.relative_to(ROOT)) in shipped


def test_the_installed_wheel_runs_from_elsewhere(wheel, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index", "--quiet"]
    call(*pip, "--target", target, wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    installed = {"PYTHONPATH": str(target)}
    probe = (
        "import seedling, seedling.launch.stage_lookup as lookup; print(seedling.__file__, lookup.PACKAGED); "
        "from seedling.stages import STAGES; import seedling.model, seedling.data.scoring, seedling.stages.runtime"
    )
    places = call(sys.executable, "-c", probe, cwd=elsewhere, **installed).split()
    assert places == [str(target / "seedling/__init__.py"), str(target / "seedling/configs")]
    shown = call(sys.executable, "-m", "seedling.launch.cli", "--help", cwd=elsewhere, **installed)
    assert "transcribe" in shown
    assert "seedling = seedling.launch.cli:main" in next(target.glob("*.dist-info/entry_points.txt")).read_text()
