"""`python -m picotrain.cli` is the `picotrain` command."""

from picotrain.cli import main

main()
