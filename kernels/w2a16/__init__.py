"""Linear layers with packed weights of 2 and 4 bits and activations of 16: y = x (scale * code + zero)^T + bias."""
