import pytest

from seedling.quant.storage import storage_of

FORM = {"bits": 2, "group_size": 64, "scale_dtype": "bfloat16", "shape": [10, 256]}


def sizes(*names: str) -> dict[str, int]:
    return {f"{name}.{tensor}": size for name in names for tensor, size in (("codes", 640), ("scale_zero", 160))}


def test_bits_per_weight_and_ratio_are_those_of_a_calculation_by_hand():
    storage = storage_of({"a": FORM}, {**sizes("a"), "a.bias": 40, "norm.weight": 20})
    assert storage.bits_per_weight == 2.5 and storage.weights == 2560
    assert storage.other_bits == 480 and storage.total_bits == 6880
    assert storage.ratio == (16 * 2560 + 480) / 6880


def test_repeated_blocks_are_one_line_and_differing_forms_are_two():
    wide = {**FORM, "bits": 4}
    forms = {"l.0.q": FORM, "l.1.q": FORM, "l.10.q": wide, "l.11.q": FORM, "conv1": FORM}
    lines = storage_of(forms, sizes(*forms)).by_pattern()
    assert [(line.name, line.count, line.weights, line.form["bits"]) for line in lines] == [
        ("l.*.q", 3, 7680, 2),
        ("l.10.q", 1, 2560, 4),
        ("conv1", 1, 2560, 2),
    ]
    assert all(line.bits_per_weight == 2.5 for line in lines)


def test_a_matrix_without_tensors_is_an_error():
    with pytest.raises(ValueError, match=r"b is said to be packed and has no tensor b\.codes"):
        storage_of({"a": FORM, "b": FORM}, sizes("a"))
