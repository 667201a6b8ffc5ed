"""Every planted fault and what the diagnosis says of it: python -m tests.parity_pairs

Exits with 1 if one was not caught.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.parity_pairs import page
from tests.parity_pairs.planted import PLANTED
from tests.parity_pairs.verdict import verdict_on


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity_pairs", description="Plant each fault in its pair.")
    parser.add_argument("--docs", action="store_true", help="write docs/planted_faults.json and docs/planted-faults.md")
    parser.add_argument("--only", action="append", metavar="WORD", help="only faults whose name holds this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults at a time")
    flags = parser.parse_args()
    faults = [fault for fault in PLANTED if not flags.only or any(word in fault.name for word in flags.only)]
    if not faults:
        parser.error(f"--only {flags.only}: no fault's name holds it")
    begun = time.monotonic()
    verdicts = {}
    with ProcessPoolExecutor(flags.jobs, multiprocessing.get_context("spawn")) as pool:
        for fault, found in zip(faults, pool.map(verdict_on, [fault.name for fault in faults]), strict=True):
            verdicts[fault.name] = found
            outcome = "right" if found.right else "caught" if found.caught else "NOT CAUGHT"
            print(f"{outcome:<10} {fault.name}: {found.level}, {found.cause} in {found.layer}", flush=True)
    caught, right = (sum(getattr(v, name) for v in verdicts.values()) for name in ("caught", "right"))
    print(f"{len(faults)} faults, {caught} caught, {right} diagnosed right, in {time.monotonic() - begun:.0f} s")
    if flags.docs:
        page.record(verdicts)
    return int(caught < len(faults))


if __name__ == "__main__":
    sys.exit(main())
