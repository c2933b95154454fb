"""One training run without torchrelay's queue: the same loop, the same data, nothing recorded. For `training.py`.

python bench/bare_training.py SPEC.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from torchrelay.settings import Settings
from torchrelay_storage.run_spec import read_spec
from torchrelay_worker.training.loop import Training
from torchrelay_worker.training.materials import make_recipe, prepare
from torchrelay_worker.training.randomness import set_deterministic
from torchrelay_worker.training.reporter import Reporter
from torchrelay_worker.training.sources import Sources
from torchrelay_worker.training.team import Team


def run(specification: Path) -> None:
    torch.set_num_threads(1)
    settings, spec = Settings.load(), read_spec(json.loads(specification.read_bytes()))
    set_deterministic(spec.deterministic)
    recipe = make_recipe(spec, settings)
    with Team("cpu", spec.precision) as team:
        ended = Training(prepare(spec, recipe, Sources(settings, team)), team, Reporter(None)).train()
    assert ended.module is not None
    with tempfile.TemporaryDirectory() as folder:
        recipe.export(ended.module, Path(folder))
    print(json.dumps(dict(ended.metrics)))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
