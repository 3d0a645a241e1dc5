"""Fbank: log-mel features on the device, the same numbers as Kaldi's, batched.

Every stage, from pretraining to inference, computes its features here, and `fingerprint()` (options and CMVN) says
whether two of them agree. The arithmetic is float32 whatever the model's precision: autocast is switched off inside,
window and mel weights are derived from the config instead of being buffers, and the two CMVN buffers refuse a change of
dtype.

Kaldi (feature-fbank.cc) differs in one point only: audio shorter than one window gives one zero-padded frame, not none.
Dither is 0: features are a function of the audio. Otherwise they agree to 1e-3, except where a bin lies more than 16
nats (70 dB) below its frame's loudest: float32 carries no more, and both are then a few 1e-2 from float64 at worst.

Shape letters: B utterances, N samples, T frames of 10 ms, W samples in a window, P FFT size, F mel bins.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .float32_buffers import Float32Buffers

# Kaldi's options assume 16-bit samples; features of [-1, 1] audio would be lower by 2 ln 32768 = 20.79 and, in quiet
# places, cut off at LOG_FLOOR.
INT16_SCALE = 32768.0
LOG_FLOOR = torch.finfo(torch.float32).eps
# Frames are transformed in slices whose buffers stay in a core's cache: 1.9 times as fast as all at once on a CPU, and
# a dozen launches per slice are nothing to a GPU.
SLICE_FRAMES = 128
WINDOWS = ("povey", "hanning", "hamming", "rectangular")


@dataclass(unsafe_hash=True)  # a cache's key; not frozen, which OmegaConf takes for "no YAML may set it"
class FeatureConfig:
    sample_rate: int = 16000
    num_mel_bins: int = 80
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    preemphasis: float = 0.97
    low_freq: float = 20.0
    high_freq: float = 0.0  # Hz; 0 or less counts down from the Nyquist frequency
    window: str = "povey"
    snip_edges: bool = True  # False: round(N / shift) frames, the audio mirrored at its ends
    remove_dc: bool = True

    def __post_init__(self):
        if self.window not in WINDOWS:
            raise ValueError(f"features.window ({self.window!r}) must be one of {', '.join(WINDOWS)}")
        if not 0 < self.shift <= self.window_size:
            raise ValueError(
                f"features.frame_shift_ms ({self.frame_shift_ms}) must be positive and at most "
                f"features.frame_length_ms ({self.frame_length_ms})"
            )
        if not 0 <= self.low_freq < self.top_freq <= self.sample_rate / 2:
            raise ValueError(
                f"features.low_freq ({self.low_freq}) and features.high_freq ({self.high_freq}, so {self.top_freq} Hz) "
                f"must be in order and within 0 and {self.sample_rate / 2} Hz, half of features.sample_rate"
            )

    @property
    def window_size(self) -> int:
        return int(self.sample_rate * self.frame_length_ms / 1000)

    @property
    def shift(self) -> int:
        return int(self.sample_rate * self.frame_shift_ms / 1000)

    @property
    def fft_size(self) -> int:
        return 1 << (self.window_size - 1).bit_length()

    @property
    def top_freq(self) -> float:
        return self.high_freq if self.high_freq > 0 else self.sample_rate / 2 + self.high_freq


def mel_weights(cfg: FeatureConfig) -> Tensor:
    """Return weights_PF, float32 [P / 2 + 1, F]: triangles of height 1 on the scale mel = 1127 ln(1 + Hz / 700)."""

    def mel(hz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hz / 700.0)

    low, high = mel(torch.tensor([cfg.low_freq, cfg.top_freq], dtype=torch.float64, device="cpu"))
    corners = torch.linspace(0, 1, cfg.num_mel_bins + 2, dtype=torch.float64, device="cpu") * (high - low) + low
    left_F, centre_F, right_F = corners[:-2], corners[1:-1], corners[2:]
    bins = torch.arange(cfg.fft_size // 2 + 1, dtype=torch.float64, device="cpu")
    mel_P1 = mel(bins * cfg.sample_rate / cfg.fft_size)[:, None]
    rising, falling = (mel_P1 - left_F) / (centre_F - left_F), (right_F - mel_P1) / (right_F - centre_F)
    weights_PF = torch.minimum(rising, falling).clamp_min(0.0)
    weights_PF[-1] = 0.0  # Kaldi leaves out the Nyquist bin
    empty = (weights_PF.sum(0) == 0).sum().item()
    if empty:
        raise ValueError(
            f"features.num_mel_bins ({cfg.num_mel_bins}): {empty} bins hold no FFT bin at {cfg.sample_rate} Hz and a "
            f"{cfg.frame_length_ms} ms window; use fewer bins"
        )
    return weights_PF.float()


def window_weights(cfg: FeatureConfig) -> Tensor:
    """Return window_W, float32: Kaldi's windows, symmetric; Povey's is Hann ** 0.85, which goes to zero at the ends."""
    phase_W = torch.arange(cfg.window_size, dtype=torch.float64, device="cpu") * (2 * math.pi / (cfg.window_size - 1))
    hann_W = 0.5 - 0.5 * phase_W.cos()
    shapes = {"povey": hann_W**0.85, "hanning": hann_W, "hamming": 0.54 - 0.46 * phase_W.cos()}
    return shapes.get(cfg.window, torch.ones_like(hann_W)).float()


@functools.lru_cache(maxsize=8)
def _constants(cfg: FeatureConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (window_P, zero beyond W, and weights_PF). No buffers: from_pretrained would leave them undefined."""
    with torch.inference_mode(False):  # cached: an inference tensor could never take part in autograd later
        window_P = nn.functional.pad(window_weights(cfg), (0, cfg.fft_size - cfg.window_size))
        return window_P.to(device), mel_weights(cfg).to(device)


class Fbank(Float32Buffers):
    """Waveforms to normalised log-mel features: (log mel - mean_F) / std_F."""

    mean_F: Tensor
    std_F: Tensor

    def __init__(self, cfg: FeatureConfig | None = None):
        super().__init__()
        self.cfg = cfg or FeatureConfig()
        self.register_buffer("mean_F", torch.zeros(self.cfg.num_mel_bins, dtype=torch.float32))
        self.register_buffer("std_F", torch.ones(self.cfg.num_mel_bins, dtype=torch.float32))

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        """Return frames_B for lengths in samples; at least one frame each."""
        cfg = self.cfg
        if cfg.snip_edges:
            return torch.clamp((lengths_B - cfg.window_size) // cfg.shift + 1, min=1)
        return torch.clamp((lengths_B + cfg.shift // 2) // cfg.shift, min=1)

    def forward(self, waveforms_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return features_BTF (float32, zero past an utterance's end) and frames_B, for waveforms in [-1, 1].

        Samples past an utterance's end may hold anything. A length below 1 or above N is a ValueError.
        """
        features_BTF, frames_B = self.log_mel(waveforms_BN, lengths_B)
        valid_BT1 = (torch.arange(features_BTF.shape[1], device=frames_B.device) < frames_B[:, None])[..., None]
        return torch.where(valid_BT1, (features_BTF - self.mean_F) / self.std_F, 0.0), frames_B

    def log_mel(self, waveforms_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return features before CMVN and frames_B; frames past an utterance's end are those of silence."""
        if waveforms_BN.ndim != 2 or lengths_B.shape != waveforms_BN.shape[:1]:
            raise ValueError(
                f"waveforms {tuple(waveforms_BN.shape)} must be [B, N] and lengths {tuple(lengths_B.shape)} [B]"
            )
        shortest, longest = (int(value) for value in lengths_B.aminmax()) if len(lengths_B) else (0, 0)
        if shortest < 1 or longest > waveforms_BN.shape[1]:
            raise ValueError(
                f"lengths must be 1 to the {waveforms_BN.shape[1]} samples given, not {shortest} to {longest}: "
                "leave empty audio out of the batch"
            )
        lengths_B = lengths_B.to(waveforms_BN.device)
        with torch.autocast(waveforms_BN.device.type, enabled=False):
            samples_BN = self._framed_samples(waveforms_BN[:, :longest].float(), lengths_B)
            return self._log_mel_of_frames(samples_BN), self.output_lengths(lengths_B)

    def _framed_samples(self, waveforms_BN: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the samples that frame t covers at [t * shift, t * shift + W), zero past each utterance's end."""
        cfg, N = self.cfg, waveforms_BN.shape[1]
        position_N = torch.arange(N, device=waveforms_BN.device)
        if cfg.snip_edges:
            samples_BN = torch.where(position_N < lengths_B[:, None], waveforms_BN * INT16_SCALE, 0.0)
            return nn.functional.pad(samples_BN, (0, max(0, cfg.window_size - N)))
        # Mirrored at both ends, as often as a very short utterance needs it.
        span = (int(self.output_lengths(lengths_B).max()) - 1) * cfg.shift + cfg.window_size
        source_N = torch.arange(span, device=waveforms_BN.device) - (cfg.window_size - cfg.shift) // 2
        source_BN = source_N % (2 * lengths_B[:, None])
        source_BN = torch.minimum(source_BN, 2 * lengths_B[:, None] - 1 - source_BN)
        return waveforms_BN.gather(1, source_BN) * INT16_SCALE

    def _log_mel_of_frames(self, samples_BN: Tensor) -> Tensor:
        window_P, weights_PF = _constants(self.cfg, samples_BN.device)
        frames_BTW = samples_BN.unfold(1, self.cfg.window_size, self.cfg.shift)
        mel_BTF = [self._power(slice_BTW, window_P) @ weights_PF for slice_BTW in frames_BTW.split(SLICE_FRAMES, dim=1)]
        return torch.cat(mel_BTF, dim=1).clamp_min(LOG_FLOOR).log()

    def _power(self, frames_BTW: Tensor, window_P: Tensor) -> Tensor:
        """Return the power spectrum [B, T, P / 2 + 1]."""
        cfg = self.cfg
        if cfg.remove_dc:
            frames_BTW = frames_BTW - frames_BTW.mean(-1, keepdim=True)
        # Kaldi's pre-emphasis takes the sample before a frame's first one to be equal to it.
        first_BT1 = (1 - cfg.preemphasis) * frames_BTW[..., :1]
        rest_BTW = frames_BTW[..., 1:] - cfg.preemphasis * frames_BTW[..., :-1]
        zeros_BTP = frames_BTW.new_zeros(1).expand(*frames_BTW.shape[:2], cfg.fft_size - cfg.window_size)
        spectrum_BTP = torch.fft.rfft(torch.cat([first_BT1, rest_BTW, zeros_BTP], dim=-1) * window_P)
        return spectrum_BTP.real.square() + spectrum_BTP.imag.square()

    def set_cmvn(self, mean_F: Tensor, std_F: Tensor) -> None:
        """Set the mean and standard deviation per mel bin."""
        for name, value in (("mean", mean_F), ("std", std_F)):
            if value.shape != self.mean_F.shape or not value.isfinite().all():
                raise ValueError(f"CMVN {name} must be {len(self.mean_F)} finite values, found {tuple(value.shape)}")
        if std_F.min() <= 0:
            raise ValueError(f"CMVN std must be positive, found {std_F.min().item():.3g}")
        self.mean_F.copy_(mean_F)
        self.std_F.copy_(std_F)

    @torch.no_grad()
    def estimate_cmvn(self, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
        """Set CMVN from (waveforms_BN, lengths_B) batches, summed in float64; return the number of frames used.

        Frames of digital silence do not count.
        """
        count = 0
        sum_F = square_F = torch.zeros(self.cfg.num_mel_bins, dtype=torch.float64, device=self.mean_F.device)
        for waveforms_BN, lengths_B in batches:
            features_BTF, frames_B = self.log_mel(waveforms_BN, lengths_B)
            valid_BT = torch.arange(features_BTF.shape[1], device=frames_B.device) < frames_B[:, None]
            frames_NF = features_BTF[valid_BT].double()
            # Digital silence sits at the floor, 30 below speech: a tenth of such frames trebles the deviation, and
            # speech comes out flat.
            frames_NF = frames_NF[(frames_NF > math.log(LOG_FLOOR) + 1e-3).any(1)]
            count, sum_F, square_F = (
                count + len(frames_NF),
                sum_F + frames_NF.sum(0),
                square_F + frames_NF.square().sum(0),
            )
        if count < 2:
            raise ValueError(f"CMVN needs at least 2 frames that are not silent, found {count}: give it some audio")
        mean_F = sum_F / count
        # A bin that never moves (digital silence, band-limited audio) must not turn rounding into large features.
        self.set_cmvn(mean_F, (square_F / count - mean_F.square()).clamp_min(1e-4).sqrt())
        return count

    def fingerprint(self) -> str:
        """Return 16 hex digits over the options and CMVN: equal fingerprints, equal features."""
        digest = hashlib.sha256(json.dumps(asdict(self.cfg), sort_keys=True).encode())
        for value in (self.mean_F, self.std_F):
            digest.update(value.detach().cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()[:16]
