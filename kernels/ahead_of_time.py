"""What a GPU would be given, without one: run a launcher, keep the machine code of the kernels that it launches.

Triton asks a driver which device it compiles for, and hands it binaries to load and launch. `Target` is such a driver
that keeps them, so a launcher is called as it is, with its own settings, block sizes and checks, on tensors of device
"meta"; no signature is written down twice. Registers, spills and instructions are then read from the machine code by
cuobjdump, which the Triton wheel carries.

Where TRITON_INTERPRET was set before triton was imported, even triton's own functions are Python ones and cannot be
compiled. So calls travel to a fresh process without that variable: functions and arguments must be picklable.
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .machine_code import Instruction, instructions_of

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # of one block, by compute capability
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # of an A100, H100 or H200, B200
REGISTERS = 65_536  # of one multiprocessor, on all of them


class Call(NamedTuple):
    """A launcher and what to call it with: tensors of device "meta" have shapes and types, which is all that counts."""

    function: Callable[..., Any]
    args: tuple = ()
    kwargs: dict[str, Any] = {}


class Compiled(NamedTuple):
    """One launch: the kernel, how it was specialised, and what became of it."""

    kernel: str
    capability: int
    constants: dict[str, Any]  # constexpr arguments by name
    grid: tuple[int, int, int]
    warps: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: stack and local memory
    shared_bytes: int  # of a block
    ptx: str
    instructions: tuple[Instruction, ...]

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Return how many blocks fit, by registers (given out to a warp in units of 256) and shared memory."""
        by_registers = REGISTERS // (self.warps * (-(-self.registers * 32 // 256) * 256))
        shared = SHARED_BYTES[self.capability] + 1024
        return min(by_registers, shared // (self.shared_bytes + 1024), 64 // self.warps, 32)


Launches = list[Compiled]  # of one call, in order


def compile_calls(calls: Sequence[Call], *, capabilities: Sequence[int] = (80, 90, 100)) -> dict[int, list[Launches]]:
    """Return by compute capability (90: Hopper) what each call launches on such a GPU.

    ValueError where triton, one of its tools or the capability is missing; what a call or the compiler raises comes
    through as it is, triton's OutOfResources where a block needs more shared memory than the device has included.
    """
    for capability in capabilities:
        if capability not in SHARED_BYTES:
            raise ValueError(f"compute capability {capability} is not known here; use one of {sorted(SHARED_BYTES)}")
    cuobjdump()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_compile_for_real) as pool:
        return {it: pool.submit(_compile_here, list(calls), it).result() for it in capabilities}


def cuobjdump() -> str:
    """Return the path of the wheel's cuobjdump; ValueError where there is none."""
    try:
        from triton import knobs
    except ImportError:
        raise ValueError(
            "compiling kernels needs triton, which is not installed: pip install 'seedling[gpu]'"
        ) from None
    try:
        return knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        raise ValueError(
            f"triton has no cuobjdump here ({error}); install its wheel from PyPI or set TRITON_CUOBJDUMP_PATH"
        ) from None


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile_here(calls: list[Call], capability: int) -> list[Launches]:
    """Run the calls in this process, with a target in the place of a device."""
    from triton import knobs
    from triton.runtime import driver

    target = Target(capability)
    driver.set_active(target)
    knobs.runtime.kernel_load_end_hook.add(target.loaded)
    try:
        found = []
        for function, args, kwargs in calls:
            target.launches = []
            function(*args, **kwargs)
            found.append([_read(launch, capability) for launch in target.launches])
        return found
    finally:
        knobs.runtime.kernel_load_end_hook.remove(target.loaded)


class Binary(NamedTuple):
    """What is loaded once and then launched, any number of times."""

    cubin: bytes
    shared_bytes: int


class Launch(NamedTuple):
    kernel: str
    constants: dict[str, Any]
    grid: tuple[int, int, int]
    warps: int
    binary: Binary
    ptx: str


class Target:
    """Triton's driver of a device that is not there: it says what the device is, and keeps what it is to launch."""

    def __init__(self, capability: int):
        self.capability = capability
        self.launches: list[Launch] = []
        self.ptx: dict[Binary, str] = {}
        self.utils = self

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # triton keeps kernels by device: those of two targets must not meet

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("meta")

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared, processors = SHARED_BYTES[self.capability], MULTIPROCESSORS[self.capability]
        return {"max_shared_mem": shared, "multiprocessor_count": processors}

    def load_binary(self, name: str, cubin: bytes, shared_bytes: int, device: int):
        """Return module, function, registers, spills and threads of a block; a binary is its own handle."""
        binary = Binary(cubin, shared_bytes)
        return binary, binary, 0, 0, 1024

    def unload_module(self, module: Binary) -> None:
        pass

    def loaded(self, module: Binary, function: Binary, name: str, files: dict[str, str], hash: str) -> None:
        """Keep the PTX of a binary; triton has written it beside the binary."""
        self.ptx[function] = Path(files[f"{name}.ptx"]).read_text(encoding="utf-8")

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}

        def launch(x: int, y: int, z: int, stream: int, binary: Binary, *_: Any) -> None:
            ptx = self.ptx[binary]
            self.launches.append(Launch(metadata.name, constants, (x, y, z), metadata.num_warps, binary, ptx))

        return launch


def _read(launch: Launch, capability: int) -> Compiled:
    registers, spilled_bytes, instructions = _machine_code(launch.binary)
    return Compiled(
        kernel=launch.kernel,
        capability=capability,
        constants={name: getattr(value, "value", value) for name, value in launch.constants.items()},
        grid=launch.grid,
        warps=launch.warps,
        registers=registers,
        spilled_bytes=spilled_bytes,
        shared_bytes=launch.binary.shared_bytes,
        ptx=launch.ptx,
        instructions=instructions,
    )


@cache
def _machine_code(binary: Binary) -> tuple[int, int, tuple[Instruction, ...]]:
    """Return registers, spilled bytes and instructions; once for a binary, however often it is launched."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.cubin)
        file.flush()
        command = [cuobjdump(), "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    return used["REG"], used["STACK"] + used["LOCAL"], instructions_of(dump)
