"""What packed weights cost: bits per weight, by matrix and overall, from names, forms and sizes alone.

It needs neither tensors nor torch, so that a file can be described by its header.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

PACKED_TENSORS = ("codes", "scale_zero")  # the rest of a packed module (its bias) is not part of the weight
UNPACKED_BITS = 16  # what a weight takes in the bf16 model that packed ones are compared to


class MatrixStorage(NamedTuple):
    """One packed matrix, or several alike (`count` of them, `weights` and `bits` all together)."""

    name: str
    form: Mapping[str, Any]
    count: int
    weights: int
    bits: int

    @property
    def bits_per_weight(self) -> float:
        """Codes, padding included, scales and zeros."""
        return self.bits / self.weights


class Storage(NamedTuple):
    """All packed matrices, and the bits of all other tensors."""

    matrices: list[MatrixStorage]
    other_bits: int

    @property
    def weights(self) -> int:
        """How many weights are packed."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def packed_bits(self) -> int:
        return sum(matrix.bits for matrix in self.matrices)

    @property
    def total_bits(self) -> int:
        return self.packed_bits + self.other_bits

    @property
    def bits_per_weight(self) -> float:
        """Of the packed weights."""
        return self.packed_bits / self.weights

    @property
    def ratio(self) -> float:
        """How many times as large the model were with 16 bits in the place of packed weights, all else as it is."""
        return (UNPACKED_BITS * self.weights + self.other_bits) / self.total_bits

    def by_pattern(self) -> list[MatrixStorage]:
        """Return matrices joined whose names differ in numbers only, where they have the same form: blocks repeat."""
        joined: dict[tuple, MatrixStorage] = {}
        for matrix in self.matrices:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", matrix.name)
            key = (pattern, repr(sorted(matrix.form.items())))
            before = joined.get(key)
            if before is None:
                joined[key] = matrix
            else:
                sums = (before[i] + matrix[i] for i in range(2, 5))
                joined[key] = MatrixStorage(pattern, matrix.form, *sums)
        return list(joined.values())


def storage_of(forms: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> Storage:
    """Return the storage of tensors of `sizes` (bytes, by name), of which `forms` says what is packed.

    ValueError where a packed matrix has no tensors.
    """
    matrices, packed = [], set()
    for name, form in forms.items():
        names = [f"{name}.{tensor}" for tensor in PACKED_TENSORS]
        missing = [tensor for tensor in names if tensor not in sizes]
        if missing:
            raise ValueError(f"{name} is said to be packed and has no tensor {missing[0]}; the files are not complete")
        packed.update(names)
        bits = 8 * sum(sizes[tensor] for tensor in names)
        matrices.append(MatrixStorage(name, form, 1, math.prod(form["shape"]), bits))
    return Storage(matrices, 8 * sum(size for name, size in sizes.items() if name not in packed))
