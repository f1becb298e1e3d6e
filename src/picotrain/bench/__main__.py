"""`python -m picotrain.bench NAME|SCRIPT [OPTION]...`: one benchmark in this process, a JSON line per setting."""

import os
import sys

from picotrain.bench import NAMES, script
from picotrain.ranks import LAUNCHER_PID
from picotrain.worker import watch_parent

if __name__ == "__main__":
    name, *arguments = sys.argv[1:] or [""]
    if name not in NAMES and not name.endswith(".py"):
        sys.exit(f"usage: python -m picotrain.bench {'|'.join(NAMES)}|SCRIPT [OPTION]...")
    watch_parent()
    os.environ.pop(LAUNCHER_PID, None)  # the runs that a benchmark starts have a launcher of their own
    sys.exit(script(name, arguments, prog=f"picotrain bench {name}" if name in NAMES else f"python {name}"))
