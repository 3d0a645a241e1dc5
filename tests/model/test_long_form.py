"""Five minutes in one pass, from waveform to text: it works, and memory grows with the length alone."""

import subprocess
import sys

import pytest

DECODE = """
import sys, torch
from pathlib import Path
from seedling.model.audio_llm import AudioLLM
from seedling.model.decoding import DecodeConfig
torch.set_num_threads(1)
model = AudioLLM.from_pretrained(sys.argv[1]).eval()
model.encoder.cfg.attention_chunk = 200
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
def run(seconds):
    waveform_BN = 0.1 * torch.randn(1, 16000 * seconds, generator=torch.Generator().manual_seed(0))
    config = DecodeConfig(beam_size=2, ctc_weight=0.3, max_new_tokens=25)
    ((best,),) = model.transcribe_ids(waveform_BN, torch.tensor([16000 * seconds]), config=config)
    assert 0 < len(best.ids) <= 25
run(4)
for seconds in map(int, sys.argv[2:]):
    before = peak()
    run(seconds)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_five_minutes_are_decoded_in_memory_that_grows_with_the_length(tiny_audio_llm, tmp_path):
    tiny_audio_llm(ctc=True).save_pretrained(tmp_path)
    command = [sys.executable, "-c", DECODE, str(tmp_path)]
    minute, five = (float(subprocess.check_output([*command, str(seconds)])) for seconds in (60, 300))
    # MB. Linear is a factor of 5; the scores of one head and layer over all pairs of frames would add 225.
    assert 20 < five < 1.1 * 5 * minute + 20, (minute, five)
