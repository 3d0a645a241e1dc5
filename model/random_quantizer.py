"""Random-projection codes of speech: the targets of masked prediction before there is an encoder to take them from.

BEST-RQ (https://arxiv.org/abs/2202.01855), several codebooks as in USM (https://arxiv.org/abs/2303.01037). A label
frame is four fbank frames x side by side; its code is argmax_v cos(c_v, A x), with A and the codebook drawn once and
never trained. Two choices are ours:
- x is normalised per utterance and mel bin, and then as a vector. Loudness and channel are one common direction in x,
  and every cosine follows it: on 51 minutes of read speech with V = 8192, global mean and variance alone give a code
  perplexity of 5 to 9 % of V, this one of 22 % (16 draws: 14 to 32 %), and no normalisation at all 0.1 %.
- Sums and cosines are float64. Two codes often lie within 1e-6 of one another, and the order of a float32 sum, which
  depends on the batch's shape, would decide between them.

Shape letters: B utterances, T frames of 10 ms, F mel bins, L label frames = ceil(T / 4), X = 4 F values of one, M
chosen label frames, N codebooks, V codes each, H values of a code.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .conformer import SUBSAMPLING, ConformerEncoder, valid_frames
from .float32_buffers import Float32Buffers

MIN_STD = 0.1  # of a mel bin after CMVN: digital silence and single frames are not blown up
# Cosines in memory at once, by device. 8 MB fit in a CPU's cache, and four times as many take 2.5 times as long. A GPU
# is done with them before the next chunk is launched: 16 codebooks of 4,000 frames would be a thousand launches.
CHUNK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass
class QuantizerConfig:
    num_codebooks: int = 1  # USM: 16 learn faster and vary less; each costs a head of encoder.dim x codebook_size
    codebook_size: int = 8192
    code_dim: int = 16
    seed: int = 0  # its own, so that runs with different `seed` predict the same codes

    def __post_init__(self):
        for name, low, high in (("num_codebooks", 1, 16), ("codebook_size", 2, 65536), ("code_dim", 2, 1024)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"quantizer.{name} ({getattr(self, name)}) must lie within {low} and {high}")


class RandomProjectionQuantizer(Float32Buffers):
    """Frozen by construction: its weights are buffers, drawn from the config's seed and saved with the encoder."""

    projection_NHX: Tensor
    codebook_NVH: Tensor

    def __init__(self, cfg: QuantizerConfig, *, num_mel_bins: int):
        super().__init__()
        self.cfg = cfg
        N, V, H, X = cfg.num_codebooks, cfg.codebook_size, cfg.code_dim, SUBSAMPLING * num_mel_bins
        generator = torch.Generator(device="cpu").manual_seed(cfg.seed)
        bound = (6 / (X + H)) ** 0.5  # Xavier
        projection = torch.rand(N, H, X, generator=generator, device="cpu", dtype=torch.float64) * 2 * bound - bound
        codebook = torch.randn(N, V, H, generator=generator, device="cpu", dtype=torch.float64)
        self.register_buffer("projection_NHX", projection.float())
        self.register_buffer("codebook_NVH", nn.functional.normalize(codebook, dim=-1).float())

    @torch.no_grad()
    def forward(self, features_BTF: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels_BLN (int64, -1 past an utterance's end) and label lengths_B, the encoder's output lengths.

        `features_BTF` are clean and without masks; frames past an utterance's end may hold anything.
        """
        x_BLX, lengths_B = stacked(features_BTF, frames_B)
        valid_BL1 = valid_frames(lengths_B, x_BLX.shape[1])
        labels_BLN = self.codes(x_BLX.flatten(0, 1)).unflatten(0, x_BLX.shape[:2])
        return torch.where(valid_BL1, labels_BLN, -1), lengths_B

    @torch.no_grad()
    def codes(self, x_MX: Tensor) -> Tensor:
        """Return labels_MN of stacked frames: `stacked` makes them, and one may choose among them first."""
        with torch.autocast(x_MX.device.type, enabled=False):
            # The length of A x is the same for all codes of a frame, so the largest product is the largest cosine.
            projections_NXH = self.projection_NHX.double().mT
            codebooks_NHV = nn.functional.normalize(self.codebook_NVH.double(), dim=-1).mT
            chunk = CHUNK_SCORES.get(x_MX.device.type, CHUNK_SCORES["cuda"])
            rows = max(1, chunk // self.cfg.codebook_size)
            labels_M = [
                torch.cat([(z_MH @ codebook_HV).argmax(-1) for z_MH in (x_MX.double() @ projection_XH).split(rows)])
                for projection_XH, codebook_HV in zip(projections_NXH, codebooks_NHV)
            ]
            return torch.stack(labels_M, dim=-1)

    def fingerprint(self) -> str:
        """Return 16 hex digits over projection, codebooks and normalisation: equal fingerprints, equal codes."""
        digest = hashlib.sha256(f"{SUBSAMPLING}/{MIN_STD}".encode())
        for value in (self.projection_NHX, self.codebook_NVH):
            digest.update(json.dumps(list(value.shape)).encode())
            digest.update(value.detach().cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write projection, codebooks and config: a later torch may draw other numbers from the same seed."""
        tensors = {"projection_NHX": self.projection_NHX, "codebook_NVH": self.codebook_NVH}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, path, metadata={"config": json.dumps(asdict(self.cfg))})

    @classmethod
    def load(cls, path: str | Path) -> "RandomProjectionQuantizer":
        with safe_open(path, framework="pt") as file:
            cfg = QuantizerConfig(**json.loads(file.metadata()["config"]))
            projection_NHX, codebook_NVH = file.get_tensor("projection_NHX"), file.get_tensor("codebook_NVH")
        quantizer = cls(cfg, num_mel_bins=projection_NHX.shape[-1] // SUBSAMPLING)
        quantizer.projection_NHX.copy_(projection_NHX)
        quantizer.codebook_NVH.copy_(codebook_NVH)
        return quantizer


@torch.no_grad()
def stacked(features_BTF: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalised x_BLX (float32) and label lengths_B; what a last label frame lacks counts as zeros."""
    valid_BT1 = valid_frames(frames_B, features_BTF.shape[1])
    x_BTF = torch.where(valid_BT1, features_BTF.double(), 0.0)
    count_B11 = frames_B[:, None, None]
    x_BTF = torch.where(valid_BT1, x_BTF - x_BTF.sum(1, keepdim=True) / count_B11, 0.0)
    x_BTF = x_BTF / (x_BTF.square().sum(1, keepdim=True) / count_B11).sqrt().clamp_min(MIN_STD)
    x_BTF = nn.functional.pad(x_BTF, (0, 0, 0, -x_BTF.shape[1] % SUBSAMPLING))
    x_BLX = x_BTF.unflatten(1, (-1, SUBSAMPLING)).flatten(2)
    return nn.functional.layer_norm(x_BLX, x_BLX.shape[-1:]).float(), ConformerEncoder.output_lengths(frames_B)
