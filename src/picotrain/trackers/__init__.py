"""Trackers: a module each, named as in `logger.trackers`; each comes with an extra of its own name."""
