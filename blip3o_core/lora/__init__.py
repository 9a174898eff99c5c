"""LoRA files and what they change in the networks."""
