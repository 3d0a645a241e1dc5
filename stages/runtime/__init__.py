"""Floor 3: what every stage shares: config, the one training loop, the engine, checkpoints, artifacts, logs."""
