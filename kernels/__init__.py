"""Floor 0: GPU kernels, each beside the equation it computes. torch and triton only."""
