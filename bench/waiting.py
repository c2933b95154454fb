"""What a batch of a million jobs costs while it waits: Redis' memory, and the producer's.

python bench/waiting.py [--jobs 1000000] [--database sqlite|postgresql]
"""

from __future__ import annotations

import argparse
import json
import resource
import time

from system import system

from torchrelay import Relay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    arguments = parser.parse_args()
    with system(arguments.database) as settings, Relay(settings=settings) as relay:
        relay.register_model("noop", handler="noop")
        relay.submit_batch("noop", ({"x": i} for i in range(10_000)))  # connections, and everything imported
        redis = relay._core.broker.redis
        before = redis.info("memory")["used_memory"]
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        batch = relay.submit_batch("noop", ({"x": i} for i in range(arguments.jobs)))
        seconds = time.perf_counter() - began
        time.sleep(1.0)  # for the announcer to fill the window
        assert batch.counts().queued == arguments.jobs
        figures = {
            "database": arguments.database,
            "jobs": arguments.jobs,
            "submitted_per_s": round(arguments.jobs / seconds),
            "redis_bytes_grown": redis.info("memory")["used_memory"] - before,
            "redis_messages": sum(relay._core.broker.depths("torchrelay.noop").values()),
            "producer_peak_grown_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss) / 1024, 1),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
