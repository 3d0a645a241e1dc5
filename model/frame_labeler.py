"""Frame labeler: waveforms to codes, the nearest centroid of every 40 ms frame at one layer of a frozen encoder.

The targets of the next iteration of masked prediction (HuBERT's scheme, https://arxiv.org/abs/2106.07447). The encoder
is cut off behind its layer, so labelling costs no more than needed; what is left is a whole speech encoder whose output
is that layer, with the encoder's own final norm on it, as `return_layers` has it.
Shape letters: B utterances, N samples, T frames of 40 ms, D width, K clusters.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .conformer import ConformerEncoder, valid_frames
from .float32_buffers import Float32Buffers
from .kmeans import nearest_centroids
from .speech_encoder import SpeechEncoder

ENCODER, CENTROIDS = "encoder", "centroids.safetensors"
NO_LABEL = -1  # past an utterance's end


def cut_encoder(encoder: SpeechEncoder, *, layer: int) -> SpeechEncoder:
    """Return a copy that ends behind Conformer layer `layer`, counted from 1; its output is that layer's."""
    whole = encoder.encoder.cfg
    if not 1 <= layer <= whole.num_layers:
        raise ValueError(f"layer ({layer}) must be 1 to {whole.num_layers}, the layers of the encoder")
    short = ConformerEncoder(replace(whole, num_layers=layer))
    state = encoder.encoder.state_dict()
    short.load_state_dict({name: state[name].clone() for name in short.state_dict()})
    fbank = type(encoder.fbank)(encoder.fbank.cfg)
    fbank.load_state_dict(encoder.fbank.state_dict())
    return SpeechEncoder.assemble(fbank=fbank, encoder=short)


class FrameLabeler(Float32Buffers):
    """A frozen encoder and centroids, always in evaluation mode; the centroids stay float32 under any cast."""

    def __init__(self, encoder: SpeechEncoder, centroids_KD: Tensor):
        super().__init__()
        if centroids_KD.shape[1] != encoder.encoder.cfg.dim:
            raise ValueError(
                f"centroids of width {centroids_KD.shape[1]} do not fit an encoder of {encoder.encoder.cfg.dim}"
            )
        self.encoder = encoder
        self.centroids_KD = nn.Buffer(centroids_KD.float())
        self.requires_grad_(False).eval()

    @property
    def num_codes(self) -> int:
        return len(self.centroids_KD)

    def train(self, mode: bool = True) -> "FrameLabeler":
        """Stay in evaluation mode: dropout would change the labels."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, waveforms_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels_BT, int64 and NO_LABEL past each utterance's end, and lengths_B in frames."""
        with torch.autocast(
            waveforms_BN.device.type, enabled=False
        ):  # bfloat16 would put one frame in thirty elsewhere
            h_BTD, lengths_B = self.encoder(waveforms_BN, lengths_B)
        valid_BT = valid_frames(lengths_B, h_BTD.shape[1])[..., 0]
        labels_BT = torch.full(valid_BT.shape, NO_LABEL, dtype=torch.int64, device=h_BTD.device)
        labels_BT[valid_BT] = nearest_centroids(h_BTD[valid_BT], self.centroids_KD)[0]
        return labels_BT, lengths_B

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder, a Hugging Face folder of its own, and the centroids."""
        self.encoder.save_pretrained(Path(folder) / ENCODER)
        save_file({"centroids_KD": self.centroids_KD.cpu().contiguous()}, Path(folder) / CENTROIDS)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "FrameLabeler":
        """Load a folder that `save_pretrained` wrote."""
        encoder = SpeechEncoder.from_pretrained(Path(folder) / ENCODER)
        return cls(encoder, load_file(Path(folder) / CENTROIDS)["centroids_KD"])
