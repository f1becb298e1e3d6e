"""Optimizers: a module each, with its section of the config. `picotrain.optim` groups parameters and guards the step."""
