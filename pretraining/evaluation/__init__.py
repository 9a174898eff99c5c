"""Scores: the scene world, GenEval, published benchmarks."""
