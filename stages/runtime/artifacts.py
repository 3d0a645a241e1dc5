"""Artifacts: what a stage hands on. A folder with a manifest; a folder without one does not exist.

manifest.json holds kind, stage, code version, inputs with the hashes of their manifests, file hashes, the resolved
config, metrics, and facts that must agree between stages (feature fingerprint, frame rate, tokenizer hash). It is
written last and the folder renamed, so a reader sees a whole artifact or none. Inputs are recorded by path and manifest
hash, and the chain can be walked back with `lineage`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from .files import describe_files, file_hash, find_damage, list_files, publish, sync_tree, write_synced

MANIFEST = "manifest.json"
FORMAT = 1


class ArtifactSpec(NamedTuple):
    """What a stage consumes. `foreign` also takes a folder without a manifest (a downloaded Hugging Face model)."""

    kind: str
    required: bool = True
    foreign: bool = False


@dataclass(frozen=True)
class Artifact:
    """A folder and its manifest. A foreign folder's manifest holds its kind and nothing else."""

    path: Path
    manifest: dict

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest.get("facts", {})

    @property
    def metrics(self) -> dict[str, float]:
        return self.manifest.get("metrics", {})

    @property
    def hash(self) -> str | None:
        """Hash of the manifest, which holds the hashes of all files; None for a foreign folder."""
        manifest = self.path / MANIFEST
        return file_hash(manifest) if manifest.is_file() else None

    def require(self, facts: dict[str, Any], *, wanted_by: str) -> None:
        """Raise ValueError naming both sides where a fact of this artifact is not what `wanted_by` expects."""
        for name, wanted in facts.items():
            found = self.facts.get(name)
            if found != wanted:
                raise ValueError(
                    f"{self.path}: {self.kind} artifact has {name} {found!r}, {wanted_by} expects {wanted!r}; "
                    f"use the setting of the artifact, or make it again"
                )

    def require_unchanged_inputs(self, *, wanted_by: str) -> None:
        """Raise ValueError where an artifact that this one was made from has been replaced by another since.

        One that is gone is no reason to refuse: what was made from it is whole without it.
        """
        for name, reference in self.manifest.get("inputs", {}).items():
            manifest = Path(reference["path"]) / MANIFEST
            wanted = reference["manifest_blake2b"]
            if wanted is not None and manifest.is_file() and (found := file_hash(manifest)) != wanted:
                raise ValueError(
                    f"{self.path}: this {self.kind} was made from the {name} {reference['path']} as it was ({wanted}), "
                    f"which has changed since ({found}), so {wanted_by} refuses it; run stage "
                    f"{self.manifest['stage']} again"
                )


def load_artifact(
    path: str | Path,
    *,
    kind: str | None = None,
    foreign: bool = False,
    verify: bool = True,
    wanted_by: str = "the caller",
) -> Artifact:
    """Open an artifact folder, checking its kind and (`verify`) the hash of every file; ValueError names both sides."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such artifact folder, wanted by {wanted_by} (kind {kind}); run the stage that makes it"
        )
    if not (path / MANIFEST).is_file():
        if foreign and kind:
            return Artifact(path, {"kind": kind, "foreign": True})
        raise ValueError(f"{path}: no {MANIFEST}, so this is no finished artifact; run the stage that makes it again")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if kind and manifest["kind"] != kind:
        raise ValueError(
            f"{path}: artifact is of kind {manifest['kind']!r} (stage {manifest['stage']}), "
            f"{wanted_by} expects {kind!r}"
        )
    if verify and (problem := find_damage(path, manifest["files"])):
        raise ValueError(f"{path}: damaged artifact: {problem}; copy it again or run stage {manifest['stage']} again")
    return Artifact(path, manifest)


def check_target(target: Path, *, kind: str, stage: str) -> None:
    """Raise ValueError where `target` holds another stage's artifact, which finishing this one would replace."""
    if (target / MANIFEST).is_file():
        there = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        if (there["kind"], there["stage"]) != (kind, stage):
            raise ValueError(
                f"{target} holds the {there['kind']} of stage {there['stage']}, stage {stage} would replace it by a "
                f"{kind}; choose another run_dir"
            )


def load_inputs(consumes: dict[str, ArtifactSpec], inputs: dict[str, str], *, stage: str) -> dict[str, Artifact]:
    """Open the artifacts that a stage's config names; ValueError for a missing, an unknown or an unfitting one."""
    unknown = sorted(set(inputs) - set(consumes))
    if unknown:
        raise ValueError(
            f"inputs.{unknown[0]}={inputs[unknown[0]]!r}: stage {stage} takes {', '.join(consumes) or 'none'}"
        )
    opened = {}
    for name, spec in consumes.items():
        if inputs.get(name):
            wanted_by = f"stage {stage} (inputs.{name})"
            opened[name] = load_artifact(inputs[name], kind=spec.kind, foreign=spec.foreign, wanted_by=wanted_by)
        elif spec.required:
            raise ValueError(
                f"stage {stage} needs inputs.{name}, an artifact of kind {spec.kind!r}; set inputs.{name}=PATH"
            )
    return opened


@dataclass
class ArtifactWriter:
    """Collects an artifact in a staging folder (`path`); `finish` makes it real. Only rank 0 finishes."""

    target: Path
    kind: str
    stage: str
    inputs: dict[str, Artifact] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the stage writes its files: beside the target, so that the last step is a rename."""
        return self.target.with_name(f".{self.target.name}.partial")

    def start(self) -> ArtifactWriter:
        """Make an empty staging folder; what an interrupted attempt left there is deleted."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        return self

    def finish(self) -> Artifact:
        """Hash the files, write the manifest, force all to disk and rename; an older artifact there is replaced."""
        names = list_files(self.path)
        if MANIFEST in names:
            raise ValueError(
                f"{self.path}: a stage may not write {MANIFEST} itself; put what it says into writer.facts"
            )
        manifest = {
            "format": FORMAT,
            "kind": self.kind,
            "stage": self.stage,
            "version": version("seedling"),
            "inputs": {name: _reference(artifact) for name, artifact in self.inputs.items()},
            "facts": self.facts,
            "metrics": self.metrics,
            "config": self.config,
            "files": describe_files(self.path, names),
        }
        write_synced(self.path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
        sync_tree(self.path)
        publish(self.path, self.target)
        return Artifact(self.target, manifest)

    def set_aside(self, name: str) -> Path:
        """Keep what was written in a folder `name` beside the target, for people to look at: it is no artifact."""
        kept = self.target.with_name(name)
        publish(self.path, kept)
        return kept


def _reference(artifact: Artifact) -> dict:
    return {"path": str(artifact.path.resolve()), "kind": artifact.kind, "manifest_blake2b": artifact.hash}


class Ancestor(NamedTuple):
    """One node of a lineage: `name` is the input's name in its child, `depth` 0 the artifact itself.

    `problem` says why the walk ends here although there should be more: the folder is gone or has changed since.
    """

    depth: int
    name: str
    path: str
    kind: str
    stage: str
    problem: str


def lineage(path: str | Path) -> list[Ancestor]:
    """Walk an artifact's inputs back to the beginning, parents after children, each with what is wrong with it."""
    artifact = load_artifact(path, verify=False)
    root = Ancestor(0, "", str(artifact.path), artifact.kind, artifact.manifest["stage"], "")
    return [root, *_ancestors(artifact, 1)]


def _ancestors(child: Artifact, depth: int) -> Iterator[Ancestor]:
    for name, reference in child.manifest.get("inputs", {}).items():
        path, wanted = Path(reference["path"]), reference["manifest_blake2b"]
        manifest_path = path / MANIFEST
        if wanted is None or not manifest_path.is_file():
            problem = "" if path.is_dir() and wanted is None else "gone"
            yield Ancestor(depth, name, str(path), reference["kind"], "", problem)
            continue
        parent = load_artifact(path, verify=False)
        problem = "" if parent.hash == wanted else "changed since it was used"
        yield Ancestor(depth, name, str(path), parent.kind, parent.manifest["stage"], problem)
        yield from _ancestors(parent, depth + 1)
