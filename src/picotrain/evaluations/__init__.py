"""Periodic evaluations beyond BPB, CORE and samples: a module each. None is built in; docs/extending.md adds one."""
