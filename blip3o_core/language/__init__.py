"""What the backbone reads and writes: prompts, conditioning, answers."""
