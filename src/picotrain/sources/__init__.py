"""Data sources beyond those of `picotrain.data.sources`: a module each. None is built in; docs/extending.md adds one."""
