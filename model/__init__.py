"""Floor 1: the architecture: features, encoder, converter, LLM, decoding. Plain arithmetic, no I/O of audio, no distribution."""
