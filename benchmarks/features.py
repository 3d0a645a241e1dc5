"""Log-mel features: Seedling's Fbank against kaldi-native-fbank, on one core, in one run.

    python benchmarks/features.py [--seconds 12] [--batch 16] [--repeats 7]

Prints audio seconds per second of CPU time (other work on the machine does not count), the ratio, and the largest
difference between the two. Audio: human speech from SEEDLING_SPEECH when set, else noise with a speech-like envelope.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import kaldi_native_fbank
import numpy as np
import soundfile
import torch

from seedling.model.features import Fbank, FeatureConfig

SAMPLE_RATE = 16000


def audio(*, utterances: int, seconds: float) -> tuple[np.ndarray, str]:
    """Return waveforms_BN in [-1, 1] and what they are."""
    samples = int(seconds * SAMPLE_RATE)
    folder = os.environ.get("SEEDLING_SPEECH")
    files = sorted(Path(folder, "librispeech_250").rglob("*.opus"))[:utterances] if folder else []
    if files:
        return np.stack([np.resize(soundfile.read(f, dtype="float32")[0], samples) for f in files]), "LibriSpeech"
    rng = np.random.default_rng(0)
    envelope_N = np.sin(np.arange(samples) * (2 * np.pi * 4 / SAMPLE_RATE)) ** 2  # 4 syllables a second
    noise_BN = rng.standard_normal((utterances, samples)) * (0.1 * envelope_N)
    return noise_BN.astype(np.float32).clip(-1, 1), "noise (SEEDLING_SPEECH is not set)"


def kaldi(waveform_N: np.ndarray) -> np.ndarray:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = FeatureConfig().num_mel_bins
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(SAMPLE_RATE, waveform_N * 32768)
    fbank.input_finished()
    return np.stack([fbank.get_frame(t) for t in range(fbank.num_frames_ready)])


def cpu_seconds(work: Callable[[], object], *, repeats: int) -> float:
    """Return the least CPU time of several runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="length of an utterance")
    parser.add_argument("--batch", type=int, default=16, help="utterances")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    waveforms_BN, source = audio(utterances=args.batch, seconds=args.seconds)
    batch_BN, lengths_B = torch.from_numpy(waveforms_BN), torch.full((len(waveforms_BN),), waveforms_BN.shape[1])
    fbank = Fbank()
    theirs_BTF = np.stack([kaldi(waveform_N) for waveform_N in waveforms_BN])
    difference_BTF = np.abs(fbank(batch_BN, lengths_B)[0].numpy() - theirs_BTF)
    # float32 carries about 16 nats; a bin farther below its frame's loudest one holds rounding errors in either system.
    loud_BTF = theirs_BTF > theirs_BTF.max(-1, keepdims=True) - 16

    total = waveforms_BN.size / SAMPLE_RATE
    peer = total / cpu_seconds(lambda: [kaldi(w) for w in waveforms_BN], repeats=args.repeats)
    rows = [("kaldi-native-fbank", peer)]
    rows.append(("seedling, one batch", total / cpu_seconds(lambda: fbank(batch_BN, lengths_B), repeats=args.repeats)))
    alone = [(batch_BN[b : b + 1], lengths_B[b : b + 1]) for b in range(len(lengths_B))]
    singly = cpu_seconds(lambda: [fbank(*utterance) for utterance in alone], repeats=args.repeats)
    rows.append(("seedling, one by one", total / singly))

    print(f"{len(waveforms_BN)} x {args.seconds:g} s of {source}, one core")
    print("| features | audio s per CPU s | ratio |\n|---|---|---|")
    for name, speed in rows:
        print(f"| {name} | {speed:,.0f} | {speed / peer:.2f} |")
    print(
        f"largest difference: {difference_BTF[loud_BTF].max():.1e} within 70 dB of a frame's loudest bin "
        f"({loud_BTF.mean():.2%} of all), {difference_BTF.max():.1e} anywhere"
    )


if __name__ == "__main__":
    main()
