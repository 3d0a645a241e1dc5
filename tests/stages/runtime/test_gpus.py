"""GPUs by name and by numbers."""

import pytest

from seedling.stages.runtime.gpus import GPUS, known_gpu, parse_gpu


def test_a_gpu_may_be_four_numbers():
    gpu = parse_gpu("96,1979,450,100")
    assert (gpu.memory, gpu.flops, gpu.node_link, gpu.network) == (96e9, 1979e12, 450e9, 100e9)
    assert gpu.usable < gpu.memory - 2e9
    for wrong in ("b300", "96,1979", "96,x,1,1", "1,1,1,1", "96,-1,1,1"):
        with pytest.raises(ValueError, match="--gpu is"):
            parse_gpu(wrong)


def test_a_gpu_is_known_by_what_its_driver_calls_it():
    assert known_gpu("NVIDIA H200") is GPUS["h200"]
    assert known_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert known_gpu("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert known_gpu("NVIDIA GeForce RTX 4090") is None
