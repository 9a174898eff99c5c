"""Train a BLIP3-o from nothing, in the paper's order, and score it; ships the scene world of the embedded model."""
