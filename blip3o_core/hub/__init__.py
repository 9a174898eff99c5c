"""Checkpoints from the model hub: a plan with sizes, then resumable, verified downloads."""
