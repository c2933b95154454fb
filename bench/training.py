"""A training run through the queue beside the same loop run bare, in pairs: what the queue costs.

python bench/training.py [--pairs 5] [--epochs 60] [--database sqlite|postgresql]

Both start a process, read the same file, train the same digits classifier by the same loop with the same seed on one
thread, and export it; bare has no database, no Redis, no checkpoints and no registry.

The two of a pair share one core, and the worker's other processes share it too, so that what disturbs the machine
disturbs both alike. While both run each gets half of it; so bare alone takes half of its seconds, and what the queue
ends later is what it costs. Runs in turns, or on two cores, differed by up to a fifth from pair to pair.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from system import system, workers

from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.run_spec import RunSpec

BARE = Path(__file__).with_name("bare_training.py")
THREADS = "1"
RECIPE = "image-classification"


@contextmanager
def one_core() -> Iterator[None]:
    """Let what this thread starts meanwhile run on one core."""
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(all_of_them)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def time_bare(settings: Settings, spec: RunSpec, folder: Path) -> tuple[float, float, RunSpec]:
    """Return the seconds and the accuracy of a bare run, and what was run."""
    path = folder / "spec.json"
    path.write_text(spec.model_dump_json())
    began = time.perf_counter()
    with one_core(), subprocess.Popen(
        [sys.executable, "-u", str(BARE), str(path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, **settings.as_environment(), "OMP_NUM_THREADS": THREADS},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        # Until it tells its result, as the queue does: how long the interpreter takes to end is nobody's concern.
        result = next(line for line in process.stdout if line.startswith("{"))
        seconds = time.perf_counter() - began
        process.stdout.read()
    return seconds, json.loads(result)["accuracy"], spec


def time_queued(relay: Relay, dataset: Path, epochs: int) -> tuple[float, float, RunSpec]:
    """Return the seconds from the submit to the result, the accuracy, and what was run."""
    began = time.perf_counter()
    run = relay.train("digits", recipe=RECIPE, dataset=dataset, epochs=epochs)
    result = run.result(timeout=600)
    return time.perf_counter() - began, result["metrics"]["accuracy"], run.spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], action="append")
    arguments = parser.parse_args()
    import numpy as np
    from sklearn.datasets import load_digits

    data = load_digits()
    for kind in arguments.database or ["sqlite", "postgresql"]:
        with (
            system(kind) as settings,
            Relay(settings=settings) as relay,
            tempfile.TemporaryDirectory() as name,
            ExitStack() as exit_,
        ):
            with one_core():
                exit_.enter_context(workers(settings, 1, "--train", "--torch-threads", THREADS))
            dataset = Path(name) / "digits.npz"
            np.savez(dataset, image=data.images.astype(np.float32), label=data.target)
            _, _, spec = time_queued(relay, dataset, 1)  # the worker is up, the files are in the caches
            spec = spec.model_copy(update={"hyperparameters": spec.hyperparameters | {"epochs": arguments.epochs}})
            costs = []
            for pair in range(arguments.pairs):
                order = ("bare", "queued") if pair % 2 else ("queued", "bare")
                with ThreadPoolExecutor(2) as pool:
                    futures = {}
                    for way in order:
                        if way == "queued":
                            futures[way] = pool.submit(time_queued, relay, dataset, arguments.epochs)
                        else:
                            futures[way] = pool.submit(time_bare, settings, spec, Path(name))
                    found = {way: future.result() for way, future in futures.items()}
                times = {way: figures[0] for way, figures in found.items()}
                assert len({figures[1] for figures in found.values()}) == 1, "both train the same"
                costs.append((times["queued"] - times["bare"]) / (times["bare"] / 2))
                figures = {way: round(seconds, 2) for way, seconds in times.items()}
                print(json.dumps({"database": kind, **figures, "cost": round(costs[-1], 4)}), flush=True)
            median = round(statistics.median(costs), 4)
            print(json.dumps({"database": kind, "epochs": arguments.epochs, "median_cost": median}), flush=True)


if __name__ == "__main__":
    main()
