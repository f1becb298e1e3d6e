"""`python -m picotrain` is the `picotrain` command."""

from picotrain.cli import main

main()
