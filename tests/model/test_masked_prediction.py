"""Masked prediction: what its loss depends on, and on what it must not."""

import pytest
import torch

from seedling.model.features import Fbank, FeatureConfig
from seedling.model.masked_prediction import MaskedPrediction, code_counts
from seedling.model.masking import MaskConfig, draw_spans
from seedling.model.random_quantizer import QuantizerConfig, RandomProjectionQuantizer


@pytest.fixture
def make(tiny_encoder):
    def make_model(num_codebooks: int = 1, *, dropout: float = 0.0) -> MaskedPrediction:
        quantizer = RandomProjectionQuantizer(
            QuantizerConfig(num_codebooks=num_codebooks, codebook_size=20), num_mel_bins=80
        )
        encoder = tiny_encoder(dropout=dropout)
        fbank = Fbank(FeatureConfig())
        return MaskedPrediction(fbank=fbank, encoder=encoder, mask=MaskConfig(), codebook_size=20, quantizer=quantizer)

    return make_model


@pytest.fixture
def batch(noise):
    """Waveforms, lengths, and a mask with its places."""
    waveforms_BN, lengths_B = noise([1.3, 0.7, 0.9])
    lengths_L = torch.tensor([32, 17, 22])
    mask_BL = draw_spans(lengths_L, MaskConfig(start_probability=0.02), seed=1)
    return {
        "waveforms_BN": waveforms_BN,
        "lengths_B": lengths_B,
        "mask_BL": mask_BL,
        "masked_M": mask_BL.flatten().nonzero()[:, 0],
    }


def run(model, batch, **more):
    torch.manual_seed(3)  # of the noise
    return model(**batch, **more)


def all_labels(model, batch):
    features_BTF, frames_B = model.fbank(batch["waveforms_BN"], batch["lengths_B"])
    return model.quantizer(features_BTF, frames_B)[0]


def test_labels_outside_the_mask_do_not_move_the_loss(make, batch):
    model = make(2)
    labels_BLN = all_labels(model, batch)
    expected = run(model, batch, labels_BLN=labels_BLN)
    others_BLN = torch.where(batch["mask_BL"][..., None], labels_BLN, torch.randint_like(labels_BLN, 20))
    assert not torch.equal(others_BLN, labels_BLN)
    for found, wanted in zip(run(model, batch, labels_BLN=others_BLN), expected):
        assert torch.equal(found, wanted)


def test_codes_come_from_clean_audio_and_equal_those_of_the_whole_utterance(make, batch):
    model = make(2)
    for found, wanted in zip(run(model, batch), run(model, batch, labels_BLN=all_labels(model, batch))):
        assert torch.equal(found, wanted)


def test_the_encoder_cannot_hear_what_is_masked(make, batch):
    """Other audio under the mask changes neither the other frames nor what the encoder makes of them."""
    model, labels_BLN = make().eval(), torch.zeros(3, 32, 1, dtype=torch.int64)
    features_BTF, frames_B = model.fbank(batch["waveforms_BN"], batch["lengths_B"])
    hidden_BT1 = batch["mask_BL"].repeat_interleave(4, dim=1)[:, : features_BTF.shape[1], None]
    losses = []
    for seed in (0, 1):
        other_BTF = torch.randn(features_BTF.shape, generator=torch.Generator().manual_seed(seed))
        changed_BTF = torch.where(hidden_BT1, other_BTF, features_BTF)
        model.fbank.forward = lambda *_, changed_BTF=changed_BTF: (changed_BTF, frames_B)
        losses.append(run(model, batch, labels_BLN=labels_BLN).loss_sum)
    assert torch.equal(*losses)


def test_the_loss_is_the_sum_over_masked_frames_of_the_mean_over_codebooks(make, batch):
    model = make(3).eval()
    out = run(model, batch)
    labels_MN = all_labels(model, batch).flatten(0, 1)[batch["masked_M"]]
    torch.manual_seed(3)
    features_BTF, frames_B = model.fbank(batch["waveforms_BN"], batch["lengths_B"])
    mask_BT1 = batch["mask_BL"].repeat_interleave(4, dim=1)[:, : features_BTF.shape[1], None]
    noisy_BTF = torch.where(mask_BT1, 0.1 * torch.randn_like(features_BTF), features_BTF)
    h_MD = model.encoder(noisy_BTF, frames_B)[0].flatten(0, 1)[batch["masked_M"]].double()
    total, correct = 0.0, []
    for n, head in enumerate(model.heads):
        log_probs_MV = (h_MD @ head.weight.double().T + head.bias.double()).log_softmax(-1)
        total -= log_probs_MV.gather(1, labels_MN[:, n : n + 1]).sum().item() / 3
        correct.append((log_probs_MV.argmax(1) == labels_MN[:, n]).sum().item())
    assert out.loss_sum.item() == pytest.approx(total, rel=1e-5)
    assert out.correct_N.tolist() == correct
    for n in range(3):
        assert out.code_counts_NV[n].tolist() == torch.bincount(labels_MN[:, n], minlength=20).tolist()


def test_one_codebook_is_the_special_case_and_equal_codebooks_change_nothing(make, batch):
    one, two = make(1), make(2)
    two.encoder.load_state_dict(one.encoder.state_dict())
    for name in ("projection_NHX", "codebook_NVH"):
        single = getattr(one.quantizer, name)
        getattr(two.quantizer, name).copy_(single.expand_as(getattr(two.quantizer, name)))
    for head in two.heads:
        head.load_state_dict(one.heads[0].state_dict())
    losses = [run(model, batch).loss_sum for model in (one, two)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, a), (_, b) in zip(one.encoder.named_parameters(), two.encoder.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_batch_gives_the_sums_of_its_utterances(make, batch):
    model = make(2).eval()
    model.mask = MaskConfig(noise_std=0.0)  # noise is drawn for the batch
    together, sums = run(model, batch), []
    for b in range(3):
        N, L = int(batch["lengths_B"][b]), (32, 17, 22)[b]
        mask_BL = batch["mask_BL"][b : b + 1, :L]
        sums.append(
            run(
                model,
                {
                    "waveforms_BN": batch["waveforms_BN"][b : b + 1, :N],
                    "lengths_B": batch["lengths_B"][b : b + 1],
                    "mask_BL": mask_BL,
                    "masked_M": mask_BL.flatten().nonzero()[:, 0],
                },
            )
        )
    assert together.loss_sum.item() == pytest.approx(sum(out.loss_sum.item() for out in sums), rel=1e-5)
    assert torch.equal(together.code_counts_NV, sum(out.code_counts_NV for out in sums))


def test_nothing_masked_is_a_loss_of_zero_with_gradients_of_zero(make, batch):
    model = make(2)
    mask_BL = torch.zeros_like(batch["mask_BL"])
    out = run(model, batch | {"mask_BL": mask_BL, "masked_M": mask_BL.flatten().nonzero()[:, 0]})
    out.loss_sum.backward()
    assert out.loss_sum.item() == 0 and out.code_counts_NV.sum() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(out, model.no_output()))


def test_checkpointed_heads_have_the_gradients_of_plain_ones(make, batch):
    """With several codebooks logits are recomputed; dropout in front of them must not be drawn anew."""
    model = make(2, dropout=0.3)
    labels_MN = all_labels(model, batch).flatten(0, 1)[batch["masked_M"]]
    h_MD = torch.randn(len(labels_MN), 24, requires_grad=True)
    model.predict(h_MD, labels_MN).loss_sum.backward()
    expected = h_MD.grad.clone()
    h_MD.grad = None
    sum(head(h_MD, labels_MN[:, n])[0] for n, head in enumerate(model.heads)).div(2).backward()
    torch.testing.assert_close(h_MD.grad, expected)


def test_counts_of_codes_are_those_of_bincount():
    labels_MN = torch.randint(0, 7, (50, 3), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.bincount(labels_M, minlength=9) for labels_M in labels_MN.unbind(1)])
    assert torch.equal(code_counts(labels_MN, 9), expected)
