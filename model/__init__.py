"""Floor 1: the architecture: features, encoder, converter, LLM, decoding. No audio files, no distribution."""
