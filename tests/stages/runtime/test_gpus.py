"""GPUs by name and by numbers."""

import pytest

from seedling.stages.runtime.gpus import GPUS, known_gpu, parse_gpu


def test_a_gpu_may_be_four_numbers():
    gpu = parse_gpu("96,1979,450,100")
    assert (gpu.memory, gpu.flops, gpu.node_link, gpu.network) == (96e9, 1979e12, 450e9, 100e9)
    assert gpu.usable < gpu.memory - 2e9
    for wrong in ("b300", "96,1979", "96,x,1,1", "1,1,1,1", "96,-1,1,1", "96,1,1,1,0", "96,1,1,1,1,1"):
        with pytest.raises(ValueError, match="--gpu is"):
            parse_gpu(wrong)


def test_a_gpu_is_known_by_what_its_driver_calls_it():
    assert known_gpu("NVIDIA H200") is GPUS["h200"]
    assert known_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert known_gpu("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert known_gpu("NVIDIA GeForce RTX 4090") is None


def test_what_runs_in_fp32_has_the_peak_of_fp32():
    h100 = GPUS["h100"]
    assert h100.peak("fp32") == 67e12 and h100.peak("bf16") == h100.peak("autocast") == 989e12
    assert parse_gpu("96,1979,450,100,70").peak("fp32") == 70e12
    with pytest.raises(ValueError, match=r"precision is fp32.*fifth number"):
        parse_gpu("96,1979,450,100").peak("fp32")
