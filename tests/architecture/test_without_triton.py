"""A machine without Triton imports everything and multiplies with packed weights: kernels are an extra."""

import subprocess
import sys

SCRIPT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

assert "triton" not in sys.modules
sys.meta_path.insert(0, Missing())

import torch
import seedling
import seedling.launch.cli
from seedling.kernels.w2a16.op import packed_linear
from seedling.kernels.w2a16.packing import pack_codes
from seedling.model.static_step import StaticSteps
from seedling.quant.unpacked import unpack
from seedling.stages import STAGES
from seedling.stages.evaluate import Evaluate

seedling.load
codes_NK = torch.randint(0, 4, (8, 64), dtype=torch.uint8)
scale_zero = torch.stack([torch.ones(1, 8), -torch.ones(1, 8)], dim=-1)
x = torch.randn(3, 64)
y = packed_linear(x, pack_codes(codes_NK, bits=2, group_size=64), scale_zero, bits=2, group_size=64)
torch.testing.assert_close(y, x @ (codes_NK.float() - 1).T)
assert not [name for name in sys.modules if name.partition(".")[0] == "triton"]
print("as without Triton")
"""


def test_everything_but_the_kernels_runs_without_triton():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600)
    assert done.stdout == "as without Triton\n", done.stderr
