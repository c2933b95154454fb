"""Where torchrelay stands beside what a user would pick instead, and beside the limit: measured, in one table.

python bench [--quick] [--only NAME ...] [--rounds 5] [--seconds 2]     50 minutes, or three when quick
python bench --report                                                     writes the table anew from what was measured

All subjects take turns on the same servers, round by round, in the opposite order in every second round. Each sample is
saved as it comes (bench/results): a run that is interrupted keeps what it has. docs/performance.md is written in the
end, from this run and what is left of earlier ones; by a quick run it is not.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import record
import report
import verdicts
from cases import Case
from goals import OURS
from ground import Ground
from record import FAILED, Sample

NAMES = ("batch", "single", "latency", "inference", "scale", "waiting", "workers", "idle")
RESULTS = Path(__file__).with_name("results")
ROUNDS, QUICK_ROUNDS = 5, 1
INTERRUPTED = 130
SECONDS, QUICK_SECONDS = 2.0, 0.5  # that a subject works at a time


class Journal:
    """What was measured so far, in one file a name; what an earlier run has left is replaced by the first sample."""

    def __init__(self, folder: Path, about: dict[str, object]) -> None:
        self._folder = folder
        self._about = about
        self._samples: dict[str, list[Sample]] = {}

    def add(self, name: str, sample: Sample) -> None:
        """Save a sample."""
        found = self._samples.setdefault(name, [])
        found.append(sample)
        record.save(self._folder / f"{name}.json", found, **self._about)

    @property
    def samples(self) -> list[Sample]:
        """All of this run."""
        return [sample for found in self._samples.values() for sample in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; return the exit code: 1 where a ratio fell, or something of ours failed."""
    arguments = parse(argv)
    folder = arguments.into or (RESULTS / "quick" if arguments.quick else RESULTS)
    files = [folder / f"{name}.json" for name in NAMES]
    samples, is_whole = ([], True) if arguments.report else measure(arguments, folder)
    if arguments.baseline:
        record.save(arguments.baseline, samples)
    everything = record.load(*files)
    if folder == RESULTS:
        report.write(everything, record.about(files))
    print(report.in_short(everything if arguments.report else samples))
    if arguments.quick:
        print("quick: batches and tables are smaller than the goals say, and the figures rough")
    code = 0 if is_whole else INTERRUPTED
    for sample in samples:
        if sample.unit == FAILED:
            print(f"{sample.measure}: {sample.subject}, {sample.variant} failed: {sample.more['error']}")
            code = code or int(sample.subject == OURS)
    if arguments.compare:
        before = verdicts.judge(record.load(arguments.compare))
        for line in verdicts.fallen(before, verdicts.judge(samples)):
            print(f"fell by more than half: {line}")
            code = code or 1
    return code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few subjects, small tables, one round")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=NAMES, default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}, or {QUICK_ROUNDS} when quick")
    parser.add_argument("--seconds", type=float, help="that each subject works at a time")
    parser.add_argument("--subject", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument("--into", metavar="FOLDER", type=Path, help="keep the results there, and leave the page alone")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the report from the results")
    parser.add_argument("--baseline", metavar="FILE", type=Path, help="write all samples of this run there too")
    parser.add_argument("--compare", metavar="FILE", type=Path,
                        help="fail where a goal's ratio fell by more than half against these samples")  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.compare and not arguments.compare.exists():
        parser.error(f"--compare: there is no file {arguments.compare}")
    arguments.rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    arguments.seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    return arguments


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[list[Sample], bool]:
    """Run all rounds, or as many as there are until Ctrl-C; return what was measured, and whether that is all."""
    journal = Journal(folder, {"seconds": arguments.seconds, "rounds": arguments.rounds})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, with the servers
    with Ground(seconds=arguments.seconds, quick=arguments.quick) as ground:
        cases = [(module.__name__.rpartition(".")[2], case) for module in modules(arguments.only)
                 for case in module.cases(ground)]  # fmt: skip
        cases = [(name, case) for name, case in cases if case.quick or not arguments.quick]
        cases = [(name, case) for name, case in cases if not arguments.subject or arguments.subject in case.name]
        began = time.monotonic()
        try:
            for round_ in range(1, arguments.rounds + 1):
                some = [(name, case) for name, case in cases if round_ <= (case.rounds or arguments.rounds)]
                for i, (name, case) in enumerate(some if round_ % 2 else reversed(some)):
                    minutes = (time.monotonic() - began) / 60
                    say(f"[{minutes:4.1f} min, round {round_}/{arguments.rounds}, {i + 1}/{len(some)}] {case.name}")
                    for sample in samples_of(case, round_):
                        say(f"    {sample.measure}: {report.figure(sample.value)} {sample.unit}")
                        journal.add(name, sample)
        except KeyboardInterrupt:
            say("interrupted; what was measured is kept")
            return journal.samples, False
    return journal.samples, True


def modules(names: Sequence[str]) -> Iterator[ModuleType]:
    """Import the measures of these names, in their own order."""
    for name in NAMES:
        if name in names:
            yield importlib.import_module(f"measures.{name}")


def samples_of(case: Case, round_: int) -> Iterator[Sample]:
    """Yield a case's samples; where it raises, one that says so."""
    try:
        yield from case.run(round_)
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if not str(error) else str(error)
        yield record.failed(case.measure, case.subject, case.variant, round_, text)


def say(text: str) -> None:
    """Tell who watches."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
