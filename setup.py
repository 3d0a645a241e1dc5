"""Packaging: the top-level folders become the package `seedling.*`.

`package_dir` maps each folder by name; mapping {"seedling": "."} would swallow every .py file of the root.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FOLDERS = ["kernels", "model", "data", "quant", "stages", "launch"]
REMOTE = ["fsspec[http]>=2026.9", "s3fs>=2026.9"]


def packages() -> dict[str, str]:
    """Return {dotted package name: folder} for every folder below FOLDERS that holds an __init__.py."""
    found = {"seedling": "seedling"}
    for folder in FOLDERS:
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            relative = init.parent.relative_to(ROOT)
            found["seedling." + ".".join(relative.parts)] = relative.as_posix()
    # The shipped YAML files travel inside the package, so that `seedling pipeline demo` works away from a clone.
    found["seedling.configs"] = "configs"
    return found


PACKAGES = packages()

setup(
    name="seedling",
    version=next(
        line.split('"')[1]
        for line in (ROOT / "seedling/__init__.py").read_text().splitlines()
        if line.startswith("__version__")
    ),
    description="Distributed training of context-aware speech recognisers, from raw speech to two-bit deployment",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"seedling.configs": ["**/*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "transformers>=5.0",
        "tokenizers>=0.23",
        "datasets>=5.0",
        "webdataset>=1.0",
        "wandb>=0.31",
        "omegaconf>=2.3",
        "numpy>=2.0",
        "soundfile>=0.13",
        "soxr>=1.0",
        "safetensors>=0.8",
        "peft>=0.21",
        "tqdm>=4.70",
        "rapidfuzz>=3.10",
        "psutil>=7.0",
        "httpx>=0.28",
        "jellyfish>=1.2",
        "pypinyin>=0.55",
    ],
    extras_require={
        "gpu": ["triton>=3.6"],
        "demo": ["espeakng-loader>=0.2.4"],
        "remote": REMOTE,  # shards on http(s):// and s3://
        "dev": [
            *REMOTE,
            "espeakng-loader>=0.2.4",
            "flask>=3.1",  # for moto, an S3 server: its own extra for that asks for sixty more packages
            "flask-cors>=6.0",
            "jiwer>=4.0",
            "kaldi_native_fbank>=1.23",
            "kubeflow-trainer-api>=2.3",
            "lhotse>=1.33",
            "moto[s3]>=5.2",
            "pyright>=1.1.414",
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "scikit-learn>=1.7",
            "scipy>=1.15",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["seedling = seedling.launch.cli:main"]},
)
