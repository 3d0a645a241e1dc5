"""Floor 2: low-bit quantisation (decoupleQ): calibrate, solve, refine, pack."""
