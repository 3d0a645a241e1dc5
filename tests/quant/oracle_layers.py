"""Synthetic layers with outlier channels and heavy tails, and the official decoupleQ code's errors on them.

`make_layer` follows a published generator draw for draw, so that the recorded numbers hold for its layers.
Shape letters: R rows = output channels, K columns = input channels, n inputs, r factors.
"""

import numpy as np

# (size, group, seed) -> calibration and held-out error of the official code, 2 bits; held-out for the last.
OFFICIAL = {
    (512, -1, 0): {"gptq": (0.05112, 0.05805), "second_level": (0.01378, 0.01518), "first_level": 0.01421},
    (512, -1, 1): {"gptq": (0.05250, 0.05952), "second_level": (0.01394, 0.01534), "first_level": 0.01430},
    (512, 64, 0): {"gptq": (0.02408, 0.02711), "second_level": (0.01026, 0.01111), "first_level": 0.01017},
    (512, 64, 1): {"gptq": (0.02462, 0.02770), "second_level": (0.01086, 0.01184), "first_level": 0.01082},
}


def make_layer(rows: int, cols: int, seed: int, *, n_cal: int | None = None, n_test: int = 4096):
    """Return W_RK, calibration inputs [n_cal or 8 * cols, K] and held-out inputs [n_test, K], float64.

    W is Student-t (10 degrees of freedom) with log-normal row scales; inputs are cols / 8 factors with power-law
    energies plus noise, log-normal channel scales, and one channel in a hundred eight times larger.
    """
    rng = np.random.default_rng(seed)
    n_cal = n_cal or 8 * cols
    r = cols // 8
    row_scale_R1 = np.exp(0.25 * rng.standard_normal((rows, 1)))
    W_RK = 0.02 * row_scale_R1 * rng.standard_t(10, size=(rows, cols))
    mix_rK = rng.standard_normal((r, cols)) / np.sqrt(r)
    decay_r = (1.0 + np.arange(r)) ** -0.5
    mix_rK = mix_rK * decay_r[:, None] * np.sqrt(r / np.sum(decay_r**2))
    channel_K = np.exp(0.5 * rng.standard_normal(cols))
    channel_K[rng.choice(cols, size=max(1, cols // 100), replace=False)] *= 8.0

    def sample(n: int) -> np.ndarray:
        factors = rng.standard_normal((n, r))
        return (factors @ mix_rK + 0.3 * rng.standard_normal((n, cols))) * channel_K

    return W_RK, sample(n_cal), sample(n_test)


def second_moment(inputs_nK: np.ndarray) -> np.ndarray:
    return inputs_nK.T @ inputs_nK / len(inputs_nK)


def relative_error(W_RK: np.ndarray, Q_RK: np.ndarray, H_KK: np.ndarray) -> float:
    """Return the output's error over its energy, tr(D H D^T) / tr(W H W^T), of the undamped H."""
    D_RK = W_RK - Q_RK
    return float(np.sum((D_RK @ H_KK) * D_RK) / np.sum((W_RK @ H_KK) * W_RK))
