"""What a stage without gradients keeps in RUN/checkpoints, so that a killed run goes on instead of starting anew.

what.json says what decides the result (inputs, data, settings); work that was begun with something else is refused, not
mixed in. Every file appears whole or not at all. All ranks see the same folder.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ...data.whole_file import whole_file, write_json
from .world import World

WHAT = "what.json"


@dataclass(frozen=True)
class KeptWork:
    folder: Path

    @classmethod
    def open(cls, folder: Path, *, begun_with: dict[str, str], anew: bool, world: World) -> KeptWork:
        """Open or make the folder, on all ranks together; `anew` deletes what is there.

        ValueError where it was begun with something else.
        """
        if world.is_main and anew:
            shutil.rmtree(folder, ignore_errors=True)
        world.barrier()
        file = folder / WHAT
        there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else begun_with
        for name, here in begun_with.items():
            if there.get(name) != here:
                raise ValueError(
                    f"{folder}: begun with {name} {there.get(name)}, which is now {here}; go on in another run_dir, or "
                    "start anew with resume=never (which deletes what is there)"
                )
        world.barrier()
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, begun_with)
        world.barrier()
        return cls(folder)

    def save(self, name: str, tensors: dict[str, Tensor], **facts: Any) -> None:
        """Write tensors and what JSON can say of them into one file; one rank calls it."""
        with whole_file(self.folder / f"{name}.safetensors") as handle:
            handle.write(save(tensors, metadata={"facts": json.dumps(facts)}))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was last saved, or None."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, json.loads(file.metadata()["facts"])

    def subfolder(self, name: str) -> Path:
        """Return a folder for files of the stage's own."""
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name
