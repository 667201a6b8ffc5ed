"""The fault suite: python -m tests.faults

Exits with 1 if anything was lost or silent, or ended with a traceback or not at all.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import page
from tests.faults.engine import Harness, run
from tests.faults.table import ALL


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Run the fault suite.")
    parser.add_argument("--docs", action="store_true", help="write docs/reliability.json and docs/reliability.md")
    parser.add_argument("--quick", action="store_true", help="only a sample of each fault's cases")
    parser.add_argument("--only", action="append", metavar="WORD", help="only faults whose name holds this")
    parser.add_argument("--share", metavar="K/N", default="0/1", help="only the K-th of N shares of the cases")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for the runs; those of bad cases stay")
    flags = parser.parse_args()
    k, n = map(int, flags.share.split("/"))
    if flags.docs and (flags.quick or n > 1):
        parser.error("--docs needs all cases: leave out --quick and --share")
    faults = [fault for fault in ALL if not flags.only or any(word in fault.name for word in flags.only)]
    if not faults:
        parser.error(f"--only {flags.only}: the faults are {', '.join(fault.name for fault in ALL)}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        harness = Harness((flags.keep or Path(folder)).absolute())
        try:
            results = run(faults, harness, flags.seed, (k, n), flags.quick, flags.jobs, lambda s: print(s, flush=True))
        finally:
            harness.close()
    print(f"{time.monotonic() - begun:.0f} s")
    if flags.docs:
        page.record(results)
    return int(any(result.failures for result in results))


if __name__ == "__main__":
    sys.exit(main())
