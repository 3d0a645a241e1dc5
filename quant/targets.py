"""Which modules get how many bits: rules in order, of which the last that matches a module decides.

As in .gitignore: general rules first, exceptions after them. What no rule matches has the default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from ..kernels.w2a16.groups import BITS
from ..kernels.w2a16.packing import plane_columns

UNTOUCHED = 16


class Target(NamedTuple):
    """How a module is to be quantised; group_size -1 is one group a row."""

    bits: int
    group_size: int


@dataclass
class QuantRule:
    """Modules whose full name `pattern` matches (as file names: * and ?). What is None is left as it was."""

    pattern: str
    bits: int | None = None  # 2, 3, 4 or 8; 16 leaves the module as it is
    group_size: int | None = None  # input channels that share a scale and a zero; -1: all of a row

    def __post_init__(self):
        if self.bits is not None:
            require_bits(f"rule {self.pattern}: bits", self.bits, also_untouched=True)
        if self.group_size is not None:
            require_group_size(f"rule {self.pattern}: group_size", self.group_size)


def require_bits(what: str, bits: int, *, also_untouched: bool = False) -> None:
    allowed = (*BITS, UNTOUCHED) if also_untouched else BITS
    if bits not in allowed:
        raise ValueError(f"{what} is {bits}; choose one of {', '.join(map(str, allowed))}")


def require_group_size(what: str, group_size: int) -> None:
    try:
        plane_columns(group_size)
    except ValueError as error:
        raise ValueError(f"{what} is {group_size}: {error}") from None


def choose_targets(
    names: Iterable[str], rules: Sequence[QuantRule], *, defaults: Mapping[str, Target]
) -> dict[str, Target]:
    """Return the target of every module of `names` that is to be quantised, in their order.

    `defaults` has what a module is where no rule matches it. ValueError where a rule matches no module.
    """
    targets = {name: defaults[name] for name in names}
    for rule in rules:
        matched = [name for name in targets if fnmatchcase(name, rule.pattern)]
        if not matched:
            raise ValueError(f"rules: {rule.pattern} matches no module that can be quantised; {_near(rule, targets)}")
        for name in matched:
            was = targets[name]
            targets[name] = Target(
                was.bits if rule.bits is None else rule.bits,
                was.group_size if rule.group_size is None else rule.group_size,
            )
    return {name: target for name, target in targets.items() if target.bits != UNTOUCHED}


def fixed_by_rules(names: Iterable[str], rules: Sequence[QuantRule]) -> set[str]:
    """Return the modules whose bits a rule gives: a budget leaves them alone."""
    return {name for name in names for rule in rules if rule.bits is not None and fnmatchcase(name, rule.pattern)}


def _near(rule: QuantRule, targets: Mapping[str, Target]) -> str:
    near = get_close_matches(rule.pattern, targets, n=3, cutoff=0.3)
    return f"near names: {', '.join(near)}" if near else f"there are {', '.join(list(targets)[:3]) or 'none'}, ..."
