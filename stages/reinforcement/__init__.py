"""Floor 4: what the stages share that learn from their own hypotheses. It knows no stage."""
