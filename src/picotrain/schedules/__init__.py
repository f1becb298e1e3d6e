"""Learning-rate schedules: a module each, with its section of the config."""
