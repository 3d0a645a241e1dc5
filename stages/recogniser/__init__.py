"""Floor 4: what the stages that train a recogniser share. It knows no stage."""
