import copy
import gc
import importlib
import weakref

import pytest
import torch
from tiny_experts import EXPERTS, FAMILIES, INNER, NAME, WIDTH, make_experts, make_moe
from torch import nn

from seedling.quant.expert_layout import DOWN, GATE_UP, activation_of, expert_layout, fused_experts


class Odd(nn.Module):
    """Three-dimensional weights as given, and a forward of the usual arguments."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def _apply_gate(self, gate_up):
        return gate_up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_of_every_layer_are_found_and_their_weights_lie_as_in_a_linear_layer(family):
    llm = make_moe(family)
    found = fused_experts(llm)
    assert list(found) == [NAME, NAME.replace("0", "1")]
    layout = expert_layout(found[NAME], name=NAME)
    assert layout.experts == EXPERTS and layout.shapes == {GATE_UP: (2 * INNER, WIDTH), DOWN: (WIDTH, INNER)}
    assert layout.transposed == (family == "gpt_oss")
    stored = found[NAME].down_proj[3]
    weight_NK = layout.weight_NK(found[NAME], DOWN, 3)
    assert torch.equal(weight_NK, stored.T if family == "gpt_oss" else stored) and not weight_NK.requires_grad
    assert (layout.bias_EN(found[NAME], GATE_UP) is not None) == (family == "gpt_oss")


def test_a_dense_model_has_no_experts():
    assert fused_experts(nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 3))) == {}


@pytest.mark.parametrize(
    ("module", "config", "experts", "transposed"),
    [
        ("aria.modeling_aria", "AriaTextConfig", "AriaExperts", True),
        ("openai_privacy_filter.modeling_openai_privacy_filter", "OpenAIPrivacyFilterConfig", None, True),
        ("nemotron_h.modeling_nemotron_h", "NemotronHConfig", "NemotronHExperts", False),
        ("deepseek_v3.modeling_deepseek_v3", "DeepseekV3Config", "DeepseekV3Experts", False),
    ],
)
def test_other_families_are_read_off_their_shapes(module, config, experts, transposed):
    modeling = importlib.import_module(f"transformers.models.{module}")
    experts = experts or config.replace("Config", "Experts")
    with torch.device("meta"):
        built = getattr(modeling, experts)(getattr(modeling, config)())
    assert expert_layout(built, name="experts").transposed == transposed


@pytest.mark.parametrize(
    ("family", "experts", "said"),
    [
        ("llama4", "Llama4TextExperts", "does not take"),
        ("longcat_flash", "LongcatFlashExperts", "_apply_gate"),
        ("muse_spark", "MuseSparkExperts", "post_expert_norm"),
    ],
)
def test_experts_of_another_form_are_refused_by_the_name_of_their_class(family, experts, said):
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config = next(
        value
        for name, value in vars(configs).items()
        if name in ("Llama4TextConfig", "LongcatFlashConfig", "MuseSparkTextConfig", "MuseSparkConfig")
    )
    with torch.device("meta"):
        built = getattr(modeling, experts)(config())
    assert list(fused_experts(nn.ModuleDict({"mlp": built}))) == ["mlp"]
    with pytest.raises(ValueError, match=rf"^a.b is a {experts}.*{said}"):
        expert_layout(built, name="a.b")


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"gate_up_proj": (2, 6, 5), "down_proj": (2, 5, 4)}, "do not fit together"),
        ({"gate_up_proj": (2, 8, 5), "down_proj": (3, 5, 4)}, "do not fit together"),
        ({"up_proj": (2, 4, 5), "down_proj": (2, 5, 4)}, "_apply_gate"),
        ({"up_proj": (2, 4, 5), "gate_proj": (2, 4, 5), "down_proj": (2, 5, 4)}, "gate_proj"),
        ({"down_proj": (2, 5, 4)}, "no three-dimensional up_proj"),
    ],
)
def test_weights_that_fit_no_form_are_refused(shapes, said):
    with pytest.raises(ValueError, match=said):
        expert_layout(Odd(**shapes), name="experts")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_activation_is_the_modules_and_keeps_none_of_its_weights(family):
    experts = make_experts(family)
    gate_up_nN = 5 * torch.randn(7, 2 * INNER)
    expected = experts._apply_gate(gate_up_nN)
    weight = weakref.ref(experts.gate_up_proj)
    activate = copy.deepcopy(activation_of(experts))
    kept = activation_of(experts)
    del experts
    gc.collect()
    assert torch.equal(activate(gate_up_nN), expected) and torch.equal(kept(gate_up_nN), expected)
    assert weight() is None
