"""Targets between the two truths: the ends are exact, between them lies the line, and slices go along."""

import pytest
import torch

from seedling.quant.mixed_targets import MixedTargets


def test_a_mix_lies_on_the_line_between_both():
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(2, 3, 4, generator=generator).bfloat16() for _ in range(3)]
    own = [torch.randn(2, 3, 4, generator=generator).bfloat16() for _ in range(3)]
    for share, wanted in ((0.0, own), (1.0, full)):
        assert all(torch.equal(one, other.float()) for one, other in zip(MixedTargets(full, own, share=share), wanted))
    mixed = MixedTargets(full, own, share=0.25)
    assert len(mixed) == 3
    for at, one in enumerate(mixed):
        torch.testing.assert_close(one.double(), 0.25 * full[at].double() + 0.75 * own[at].double())
    assert torch.equal(mixed[1:][0], mixed[1])


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match=r"is 1\.5; give"):
        MixedTargets([], [], share=1.5)
    with pytest.raises(ValueError, match="1 targets of the full path and 0 own"):
        MixedTargets([torch.zeros(1)], [], share=0.5)
