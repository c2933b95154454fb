"""`python -m chaos --seed 17 --database sqlite`: one run, or one on each database; exits with 1 where one fails.

Without a seed a fresh one is drawn and printed. The folder `tests` must be on PYTHONPATH, as `make chaos` does it.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from chaos.run import Plan, run
from chaos.schedule import DATABASE_KINDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description="Attacks a whole system, and checks it.")
    parser.add_argument("--seed", type=int, help="of the workload and the faults (default: a fresh one)")
    parser.add_argument("--database", choices=[*DATABASE_KINDS, "both"], default="both")
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--span", type=float, help="seconds in which the faults come (default: by their number)")
    parser.add_argument("--only", action="append", default=[], help="this kind of fault alone; may be repeated")
    parser.add_argument("--report", type=Path, help="a file for the report as JSON")
    parser.add_argument("--keep", action="store_true", help="leave the folder with database, logs and journals")
    found = parser.parse_args(argv)
    seed = found.seed if found.seed is not None else secrets.randbelow(1_000_000)
    databases = list(DATABASE_KINDS) if found.database == "both" else [found.database]
    code = 0
    for database in databases:
        folder = Path(tempfile.mkdtemp(prefix=f"torchrelay-chaos-{database}-"))
        print(f"seed {seed} on {database} in {folder}", flush=True)
        plan = Plan(seed, database, found.jobs, found.faults, found.span, only=tuple(found.only))
        report = run(plan, folder, lambda line: print(line, flush=True))
        print(report, flush=True)
        if found.report:
            path = found.report
            if len(databases) > 1:
                path = path.with_stem(f"{path.stem}-{database}")
            report.save(path)
        if not report.passed:
            code = 1
            print(f"replay it: make chaos SEED={seed} DATABASE={database}; what it left is in {folder}", flush=True)
        elif not found.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
