"""What was measured: a sample each, kept as JSON. Every measure, limit and peer yields samples; nothing else is kept.

Not here: what they mean together (`goals`, `report`).
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FAILED = "failed"  # the unit of a sample whose subject could not run here; `more["error"]` says why


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure of one subject in one round.

    Attributes:
        measure: what was measured, such as `batch drain`.
        subject: of whom: `torchrelay`, a peer's name, or a limit such as `bare loop`.
        variant: how it was set up, such as `postgresql, 1 worker`.
        unit: such as `jobs/s`, or FAILED.
        more: the subject's `version`, `settings` and what it `keeps`, and figures beside the one that counts.
    """

    measure: str
    subject: str
    variant: str
    round: int
    value: float
    unit: str
    more: Mapping[str, Any] = field(default_factory=dict)


def failed(measure: str, subject: str, variant: str, round_: int, error: str) -> Sample:
    """Return the sample of a subject that could not run."""
    return Sample(measure, subject, variant, round_, 0.0, FAILED, {"error": error})


def machine() -> dict[str, Any]:
    """Say where the figures were taken, as far as it matters to them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def save(path: Path, samples: Sequence[Sample], **about: Any) -> None:
    """Write samples, whole or not at all: whoever reads meanwhile sees the file before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    head = json.dumps({"written": written, "machine": machine(), **about})
    lines = ",\n".join(json.dumps(asdict(sample)) for sample in samples)
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(f'{{"about": {head},\n"samples": [\n{lines}\n]}}\n')  # a line a sample: a diff shows what changed
    draft.replace(path)


def load(*paths: Path) -> list[Sample]:
    """Return the samples of these files, in order; a file that does not exist has none."""
    return [Sample(**fields) for path in paths if path.exists() for fields in _read(path)["samples"]]


def about(paths: Iterable[Path]) -> dict[str, Any]:
    """Return what the newest of these files says of itself: when it was written, and on what machine."""
    found = [dict(_read(path)["about"]) for path in paths if path.exists()]
    return max(found, key=lambda one: str(one["written"]), default={})


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
