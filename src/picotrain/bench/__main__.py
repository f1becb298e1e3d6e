"""`python -m picotrain.bench NAME [OPTION]...`: one benchmark in this process, a JSON line per setting."""

import os
import sys

from picotrain.bench import NAMES, script
from picotrain.ranks import LAUNCHER_PID
from picotrain.worker import watch_parent

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m picotrain.bench {'|'.join(NAMES)} [OPTION]...")
    watch_parent()
    os.environ.pop(LAUNCHER_PID, None)  # the runs that a benchmark starts have a launcher of their own
    sys.exit(script(sys.argv[1], sys.argv[2:], prog=f"picotrain bench {sys.argv[1]}"))
