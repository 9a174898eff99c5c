"""What the training nodes do."""
