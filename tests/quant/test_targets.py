"""Rules: the last that matches decides, what matches nothing is an error with near names."""

import pytest

from seedling.quant.targets import QuantRule, Target, choose_targets

NAMES = ["encoder.layers.0.ff1.1", "llm.model.layers.0.mlp.up_proj", "llm.model.layers.1.mlp.up_proj", "converter.proj"]
DEFAULTS = {name: Target(16 if name == "converter.proj" else 2, 64) for name in NAMES}


def chosen(*rules):
    return choose_targets(NAMES, list(rules), defaults=DEFAULTS)


def test_without_rules_everything_has_its_default_and_sixteen_bits_are_no_target():
    assert chosen() == {name: Target(2, 64) for name in NAMES[:3]}


def test_the_last_rule_that_matches_decides_field_by_field():
    found = chosen(
        QuantRule("llm.*", bits=4, group_size=32), QuantRule("*.layers.1.*", bits=3), QuantRule("encoder.*", bits=16)
    )
    assert found == {NAMES[1]: Target(4, 32), NAMES[2]: Target(3, 32)}
    assert chosen(QuantRule("*.layers.1.*", bits=3), QuantRule("llm.*", bits=4))[NAMES[2]] == Target(4, 64)


def test_what_is_off_by_default_can_be_asked_for():
    assert chosen(QuantRule("converter.proj", bits=4, group_size=-1))["converter.proj"] == Target(4, -1)


def test_a_rule_that_matches_nothing_names_near_modules():
    with pytest.raises(
        ValueError, match=r"rules: llm\.model\.layers\.0\.mlp\.up matches no module.*near names: llm\.model\.layers\.0"
    ):
        chosen(QuantRule("llm.model.layers.0.mlp.up", bits=4))


@pytest.mark.parametrize(
    "values, said", [({"bits": 5}, "bits is 5"), ({"bits": 1}, "bits is 1"), ({"group_size": 0}, "group_size is 0")]
)
def test_a_rule_that_cannot_be_followed_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        QuantRule("*", **values)
