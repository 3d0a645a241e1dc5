"""Reads what cuobjdump -sass prints: instructions, loops, and which unit of a multiprocessor each one keeps busy.

A line is `/*00c0*/ @!P0 BRA 0x390 ;`: address, guard, opcode with its modifiers, operands. A loop is what lies between
a branch backwards and its target.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);", re.MULTILINE)
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")


class Instruction(NamedTuple):
    address: int
    opcode: str  # with modifiers: LDG.E.128
    operands: str

    @property
    def name(self) -> str:
        """Return the opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Return where a branch goes."""
        found = TARGET.search(self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


class Unit(Enum):
    """What executes an instruction. An instruction of another kind still takes a slot to be issued."""

    INTEGER = "integer and logic"  # 64 lanes a clock and multiprocessor, half of what is issued
    FLOAT = "multiply-add"  # IMAD included
    CONVERT = "conversion and transcendental"  # 16 lanes
    TENSOR = "tensor core"
    MEMORY = "load and store"
    OTHER = "other"


INTEGER = (
    "LOP3 LOP SHF SHL SHR IADD3 IADD LEA PRMT ISETP SEL VIADD IMNMX VIMNMX VIMNMX3 IABS BMSK SGXT MOV PLOP3 R2P P2R "
    "FSETP FSEL FMNMX HSETP2 HMNMX2 I2FP F2FP VABSDIFF"
)
FLOAT = "IMAD FFMA FFMA2 FMUL FMUL2 FADD FADD2 HFMA2 HADD2 HMUL2 IDP"
CONVERT = "I2F F2I F2F I2I MUFU POPC FLO BREV FRND"
TENSOR = "HMMA IMMA HGMMA IGMMA QGMMA UTCHMMA UTCQMMA UTCIMMA"
MEMORY = "LDG STG LDS STS LDSM STSM LDGSTS LDL STL LD ST RED ATOM ATOMG ATOMS UTMALDG UTMASTG UBLKCP SHFL LDTM STTM"
UNITS = {
    name: unit
    for unit, names in zip(Unit, (INTEGER, FLOAT, CONVERT, TENSOR, MEMORY), strict=False)
    for name in names.split()
}


def instructions_of(dump: str) -> tuple[Instruction, ...]:
    """Return the instructions of a dump in order, without the NOPs that fill the end."""
    found = (Instruction(int(address, 16), opcode, rest.strip()) for address, opcode, rest in LINE.findall(dump))
    return tuple(instruction for instruction in found if instruction.name != "NOP")


def count(instructions: Iterable[Instruction], *names: str) -> int:
    """Return how many have one of these names; LDG.E.128 is found as LDG and as LDG.E.128, not as LDG.128."""
    return sum(f"{i.opcode}.".startswith(tuple(f"{name}." for name in names)) for i in instructions)


def by_unit(instructions: Iterable[Instruction]) -> Counter[Unit]:
    """Return how many instructions each unit executes."""
    return Counter(UNITS.get(instruction.name, Unit.OTHER) for instruction in instructions)


def loops(instructions: Sequence[Instruction]) -> Iterator[Sequence[Instruction]]:
    """Yield the bodies of the innermost loops, in order; one that an instruction of its own leaves is whole."""
    ends = [(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address]
    for first, last in ends:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in ends):
            yield [i for i in instructions if first <= i.address <= last]


def busiest_loop(instructions: Sequence[Instruction], *names: str) -> Sequence[Instruction]:
    """Return the innermost loop with the most instructions of these names; all instructions where none has any."""
    best = max(loops(instructions), key=lambda body: count(body, *names), default=instructions)
    return best if count(best, *names) else instructions
