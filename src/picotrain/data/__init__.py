"""Corpus -> units -> rows -> batches (nothing is imported here, so that planning never pays for torch)."""
