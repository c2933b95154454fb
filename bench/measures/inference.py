"""(d) Real inference: MiniLM over texts of mixed length, the digits CNN, EfficientNet; the limits, and the peers.

    python bench --only inference

Ours: a batch of jobs through a real worker with one torch thread, from the submit to the moment at which all are
recorded; the worker has the model loaded and has served it. The handlers are those that a user has: of
examples/embeddings, the one called `digits`, and bench/handlers/efficientnet.py. Results are compared with the bare
model's before a figure counts. Limits: bench/limits/{minilm,digits,efficientnet}.py; for the digits also the bare
database loop, which submits and drains the same rows and computes nothing.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import digits_model
from cases import Case
from ground import Ground
from limits import alone, postgresql, sqlite
from measures import serving
from measures.ours import SUBJECT, TIMEOUT, about, variant
from measures.serving import MINILM, TWO_CORES
from photos import photos, weights_file
from record import Sample
from system import warm, workers
from texts import texts

from torchrelay import Relay

MEASURES = ("minilm", "minilm, two cores", "minilm, 5,000 texts", "digits", "efficientnet")

TEXTS, QUICK_TEXTS = 500, 100  # for everybody: 1 % fewer tokens on average than all 5,000
ALL_TEXTS = 5_000
DIGITS, QUICK_DIGITS = 100_000, 10_000
PHOTOS, QUICK_PHOTOS = 200, 20
ROUNDS = 3  # of what takes longer than it varies
CHECKED = 16  # vectors that are compared
SAME = 0.9999  # the cosine from which two are the same
AGREE = 0.98  # of EfficientNet's classes: two that are as likely may change places with the batch's size
SETTINGS = "1 torch thread, 2 preprocessing threads a worker"
HANDLERS = {
    "embeddings": "handlers.embeddings:Embeddings",
    "efficientnet": "handlers.efficientnet:EfficientNet",
}


def cases(ground: Ground) -> list[Case]:
    """Ours, the limits and the peers."""
    n = QUICK_TEXTS if ground.quick else TEXTS
    lite = variant("sqlite", 1)
    found = [
        Case(MINILM, SUBJECT, lite, partial(_texts, ground, MINILM, n, 1), quick=True),
        Case(MINILM, "bare loop", "", partial(_bare_texts, ground, MINILM, n), quick=True),
        Case(TWO_CORES, SUBJECT, variant("sqlite", 2), partial(_texts, ground, TWO_CORES, n, 2), rounds=ROUNDS),
    ]
    found += serving.cases(ground, n)
    long = "minilm, 5,000 texts"
    found.append(Case(long, SUBJECT, lite, partial(_texts, ground, long, ALL_TEXTS, 1), rounds=1))
    found.append(Case(long, "bare loop", "", partial(_bare_texts, ground, long, ALL_TEXTS), rounds=1))
    for kind in ("sqlite", "postgresql"):
        run = partial(_digits, ground, kind)
        found.append(Case("digits", SUBJECT, variant(kind, 1), run, quick=kind == "sqlite"))
        found.append(Case("digits", "bare database loop", kind, partial(_bare_rows, ground, kind), quick=True))
    found.append(Case("digits", "bare loop", "", partial(_bare_digits, ground), quick=True))
    found.append(Case("efficientnet", SUBJECT, lite, partial(_photos, ground), rounds=ROUNDS))
    found.append(Case("efficientnet", "bare loop", "", partial(_bare_photos, ground), rounds=ROUNDS))
    return found


def measure(round_: int, quick: bool) -> list[Sample]:
    """Return all samples of one round, on servers of its own."""
    with Ground(seconds=1.0, quick=quick) as ground:
        chosen = [case for case in cases(ground) if case.quick or not quick]
        return [sample for case in chosen if round_ <= (case.rounds or round_) for sample in case.run(round_)]


# --- ours -------------------------------------------------------------------------------------------------------------


@contextmanager
def _serving(
    ground: Ground, kind: str, model: str, value: Any, *, n: int = 1, handler: str = "", weights: Path | None = None
) -> Iterator[Relay]:
    """Yield a relay on fresh tables with n workers that have served the model, with one torch thread each."""
    with (
        ground.fresh(kind, handlers=HANDLERS) as settings,
        Relay(settings=settings) as relay,
        alone.one_thread(),
    ):
        relay.register_model(model, handler=handler or model, weights=weights)
        with workers(settings, n, "--torch-threads", "1"):
            warm(relay, model, value, n)
            yield relay


def _through(relay: Relay, model: str, inputs: Iterable[Any], jobs: int, checked: int) -> tuple[float, list[Any]]:
    """Return the jobs per second of a batch from its submit to its end, and its first results."""
    began = time.perf_counter()
    batch = relay.submit_batch(model, inputs)
    counts = batch.wait(timeout=TIMEOUT)
    seconds = time.perf_counter() - began
    if counts.succeeded != jobs:
        raise RuntimeError(f"of {jobs} jobs {counts.succeeded} succeeded")
    return jobs / seconds, list(islice(batch.results(), checked))


def _texts(ground: Ground, name: str, n: int, count: int, round_: int) -> Iterator[Sample]:
    some = texts(n)
    with _serving(ground, "sqlite", "minilm", some[0], n=count, handler="embeddings") as relay:
        relay.submit_batch("minilm", some[:32]).wait(timeout=TIMEOUT)
        rate, vectors = _through(relay, "minilm", some, n, CHECKED)
    cosine = min(map(_cosine, vectors, _right_vectors()))
    if not cosine > SAME:
        raise RuntimeError(f"a vector is wrong: cosine {cosine:.5f}")
    more = about(f"the handler of examples/embeddings as it is, {SETTINGS}", jobs=n, cosine=round(cosine, 6))
    yield Sample(name, SUBJECT, variant("sqlite", count), round_, rate, "texts/s", more)


def _digits(ground: Ground, kind: str, round_: int) -> Iterator[Sample]:
    n = QUICK_DIGITS if ground.quick else DIGITS
    first = next(digits_model.inputs(1))
    with _serving(ground, kind, "digits", first, weights=_program(ground)) as relay:
        relay.submit_batch("digits", digits_model.inputs(2_000)).wait(timeout=TIMEOUT)
        rate, results = _through(relay, "digits", digits_model.inputs(n), n, len(digits_model.pictures()[1]))
    if [result["label"] for result in results] != _right_labels(_program(ground)):
        raise RuntimeError("the predictions are not those of the bare model")
    yield Sample("digits", SUBJECT, variant(kind, 1), round_, rate, "pictures/s",
                 about(f"the handler `digits`, {SETTINGS}", jobs=n))  # fmt: skip


def _photos(ground: Ground, round_: int) -> Iterator[Sample]:
    some = photos(QUICK_PHOTOS if ground.quick else PHOTOS)
    with _serving(ground, "sqlite", "efficientnet", some[0], weights=weights_file()) as relay:
        relay.submit_batch("efficientnet", some[:8]).wait(timeout=TIMEOUT)
        rate, results = _through(relay, "efficientnet", some, len(some), len(some))
    right = _right_classes(len(some))
    agree = sum(result["class"] == one for result, one in zip(results, right, strict=True)) / len(some)
    if agree < AGREE:
        raise RuntimeError(f"only {agree:.1%} of the classes are those of the bare model")
    more = about(f"bench/handlers/efficientnet.py, {SETTINGS}", jobs=len(some), agree=agree)
    yield Sample("efficientnet", SUBJECT, variant("sqlite", 1), round_, rate, "pictures/s", more)


# --- the limits -------------------------------------------------------------------------------------------------------

_ways: dict[str, str] = {}  # the best way of the first round: all are tried only then


def _bare_texts(ground: Ground, name: str, n: int, round_: int) -> Iterator[Sample]:
    way = _ways.get(name)
    found = alone.run("minilm", "--texts", str(n), *(["--way", way] if way else []))
    _ways[name] = found["way"]
    more = {"settings": f"{found['way']}; 1 torch thread, 1 process", "keeps": "nothing", "jobs": n, **found}
    yield Sample(name, "bare loop", "", round_, found["texts_per_s"], "texts/s", more)


LOOPS = {
    "values": ("bare loop", "from JSON values to JSON values, a whole batch at a time"),
    "hooks": ("bare loop of the hooks", "the handler's own hooks, picture by picture"),
    "tensors": ("bare loop, tensors ready", "from one tensor that lies ready to JSON values"),
}


def _bare_digits(ground: Ground, round_: int) -> Iterator[Sample]:
    n = QUICK_DIGITS if ground.quick else DIGITS
    found = alone.run("digits", str(_program(ground)), "--pictures", str(n))
    for loop, (subject, words) in LOOPS.items():
        more = {"settings": f"{words}, batches of {found[loop]['size']}, 1 torch thread, 1 process", "keeps": "nothing",
                "jobs": n, "known": found[loop]["known"]}  # fmt: skip
        yield Sample("digits", subject, "", round_, found[loop]["pictures_per_s"], "pictures/s", more)


def _bare_rows(ground: Ground, kind: str, round_: int) -> Iterator[Sample]:
    n = QUICK_DIGITS if ground.quick else DIGITS
    inputs = digits_model.inputs(n)
    with ground.fresh(kind) as settings:
        if kind == "postgresql":
            limit = postgresql.measure(settings.database_url, inputs, _no_model)
        else:
            limit = sqlite.measure(settings.database_url.removeprefix("sqlite:///"), inputs, _no_model)
    rate = 1.0 / (1.0 / limit.submitted_per_s + 1.0 / limit.drained_per_s)
    more = {"settings": "submitted, then drained, by the bare driver; nothing is computed", "jobs": n,
            "keeps": "status and result of every job, in SQL"}  # fmt: skip
    yield Sample("digits", "bare database loop", kind, round_, rate, "pictures/s", more)


def _no_model(values: list[Any]) -> list[Any]:
    return [{"label": 7, "probability": 0.998877}] * len(values)


def _bare_photos(ground: Ground, round_: int) -> Iterator[Sample]:
    n = QUICK_PHOTOS if ground.quick else PHOTOS
    found = alone.run("efficientnet", "--pictures", str(n))
    more = {"settings": f"batches of {found['size']}, 1 torch thread, 1 process", "keeps": "nothing", "jobs": n,
            "sample": found["sample"]}  # fmt: skip
    yield Sample("efficientnet", "bare loop", "", round_, found["pictures_per_s"], "pictures/s", more)


# --- what is right ----------------------------------------------------------------------------------------------------


def _cosine(got: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(got, right, strict=True)) / (math.hypot(*got) * math.hypot(*right))


@cache
def _right_vectors() -> list[list[float]]:
    vectors: list[list[float]] = alone.run("minilm", "--texts", str(CHECKED), "--vectors")
    return vectors


@cache
def _right_labels(program: Path) -> list[int]:
    n = len(digits_model.pictures()[1])
    labels: list[int] = alone.run("digits", str(program), "--pictures", str(n), "--size", "256")["labels"]
    return labels


@cache
def _right_classes(n: int) -> list[int]:
    classes: list[int] = alone.run("efficientnet", "--pictures", str(n), "--size", "1")["classes"]
    return classes


def _program(ground: Ground) -> Path:
    """Return the digits' program, trained once a run."""
    path = ground.folder / "digits.pt2"
    if not path.exists():
        subprocess.run([sys.executable, digits_model.__file__, str(path)], check=True, capture_output=True)
    return path
