"""Start one command, and write to a file what it took: run as a small process of its own.

The kernel gives a new process the peak memory of the one that started it, so whoever measures memory must be small.
"""

import os
import sys
import time

where, *argv = sys.argv[1:]
started = time.perf_counter()
pid = os.posix_spawnp(argv[0], argv, os.environ)
_, status, used = os.wait4(pid, 0)
took = time.perf_counter() - started
with open(where, "w", encoding="utf-8") as file:  # noqa: PTH123 (pathlib is memory)
    file.write(f"{took} {used.ru_utime + used.ru_stime} {used.ru_maxrss / 1024}")
sys.exit(os.waitstatus_to_exitcode(status) and 1)
