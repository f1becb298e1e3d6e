"""Architectures: a folder each, with its section of the config (no torch) and its module. `picotrain.model` has what they share."""
