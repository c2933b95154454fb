"""No-op jobs through real workers: submitted per second, and drained per second, on SQLite and PostgreSQL.

python bench/throughput.py [--jobs 100000] [--workers 1] [--database sqlite|postgresql]
"""

from __future__ import annotations

import argparse
import json
import time

from system import system, warm, workers

from torchrelay import Relay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], action="append")
    arguments = parser.parse_args()
    for kind in arguments.database or ["sqlite", "postgresql"]:
        with system(kind) as settings, Relay(settings=settings) as relay, workers(settings, arguments.workers):
            relay.register_model("noop", handler="noop", chunk_size=1000)
            warm(relay, "noop", {"x": 0}, arguments.workers)
            for _ in range(arguments.rounds):
                began = time.perf_counter()
                relay.pause("noop")
                batch = relay.submit_batch("noop", ({"x": i} for i in range(arguments.jobs)))
                submitted = time.perf_counter() - began
                began = time.perf_counter()
                relay.resume("noop")
                counts = batch.wait(timeout=600)
                drained = time.perf_counter() - began
                assert counts.succeeded == arguments.jobs
                figures = {
                    "database": kind,
                    "workers": arguments.workers,
                    "jobs": arguments.jobs,
                    "submitted_per_s": round(arguments.jobs / submitted),
                    "drained_per_s": round(arguments.jobs / drained),
                }
                print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
