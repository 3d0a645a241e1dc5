"""Floor 1: audio and text in, planned batches out; scoring."""
