"""A training run through the queue beside the same loop run bare, in pairs: what the queue costs.

python bench/training.py [--pairs 5] [--epochs 60] [--database sqlite|postgresql]

Both start a process, read the same file, train the same digits classifier by the same loop with the same seed on one
thread, and export it; bare has no database, no Redis, no checkpoints and no registry. A pair's order alternates.
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
from pathlib import Path

from system import system, workers

from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.run_spec import RunSpec, read_spec

THREADS = "1"
RECIPE = "image-classification"


def bare(specification: Path) -> None:
    """Train without torchrelay's queue. Run in a process of its own."""
    import torch

    from torchrelay_worker.training.loop import Training
    from torchrelay_worker.training.materials import make_recipe, prepare
    from torchrelay_worker.training.randomness import set_deterministic
    from torchrelay_worker.training.reporter import Reporter
    from torchrelay_worker.training.sources import Sources
    from torchrelay_worker.training.team import Team

    torch.set_num_threads(int(THREADS))
    settings, spec = Settings.load(), read_spec(json.loads(specification.read_bytes()))
    set_deterministic(spec.deterministic)
    recipe = make_recipe(spec, settings)
    with Team("cpu", spec.precision) as team:
        ended = Training(prepare(spec, recipe, Sources(settings, team)), team, Reporter(None)).train()
    assert ended.module is not None
    with tempfile.TemporaryDirectory() as folder:
        recipe.export(ended.module, Path(folder))
    print(json.dumps(dict(ended.metrics)))


def time_bare(settings: Settings, spec: RunSpec, folder: Path) -> tuple[float, float]:
    """Return the seconds and the accuracy of a bare run."""
    path = folder / "spec.json"
    path.write_text(spec.model_dump_json())
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--bare", str(path)], check=True, capture_output=True, text=True,
        env={**os.environ, **settings.as_environment(), "OMP_NUM_THREADS": THREADS},
    )  # fmt: skip
    seconds = time.perf_counter() - began
    return seconds, json.loads(done.stdout.splitlines()[-1])["accuracy"]


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
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare is not None:
        bare(arguments.bare)
        return
    import numpy as np
    from sklearn.datasets import load_digits

    data = load_digits()
    for kind in arguments.database or ["sqlite", "postgresql"]:
        with (
            system(kind) as settings,
            Relay(settings=settings) as relay,
            workers(settings, 1, "--train", "--torch-threads", THREADS),
            tempfile.TemporaryDirectory() as name,
        ):
            dataset = Path(name) / "digits.npz"
            np.savez(dataset, image=data.images.astype(np.float32), label=data.target)
            _, _, spec = time_queued(relay, dataset, 1)  # the worker is up, the files are in the caches
            spec = spec.model_copy(update={"hyperparameters": spec.hyperparameters | {"epochs": arguments.epochs}})
            ratios = []
            for pair in range(arguments.pairs):
                times = {}
                accuracies = set()
                for way in ("bare", "queued") if pair % 2 else ("queued", "bare"):
                    if way == "bare":
                        times[way], accuracy = time_bare(settings, spec, Path(name))
                    else:
                        times[way], accuracy, _ = time_queued(relay, dataset, arguments.epochs)
                    accuracies.add(accuracy)
                assert len(accuracies) == 1, "both train the same"
                ratios.append(times["queued"] / times["bare"])
                figures = {way: round(seconds, 2) for way, seconds in times.items()}
                print(json.dumps({"database": kind, **figures, "ratio": round(ratios[-1], 4)}), flush=True)
            median = round(statistics.median(ratios), 4)
            print(json.dumps({"database": kind, "epochs": arguments.epochs, "median_ratio": median}), flush=True)


if __name__ == "__main__":
    main()
