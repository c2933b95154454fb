"""`python -m torchrelay_worker`: one worker on one device. `torchrelay worker` is the same."""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections.abc import Sequence

import structlog

from torchrelay.settings import Settings
from torchrelay_storage.errors import InvalidInput, RelayError, Unreachable
from torchrelay_worker import logs
from torchrelay_worker.exits import EXIT_UNREACHABLE, EXIT_USAGE
from torchrelay_worker.inner import Options
from torchrelay_worker.supervisor import Supervisor

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def _default_name() -> str:
    # Process ids repeat in containers; a container's host name does not.
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', socket.gethostname())[:48].lstrip('._-') or 'worker'}-{os.getpid()}"


def parse(argv: Sequence[str] | None = None) -> Options:
    """Read the command line. Exits with 2 where it makes no sense."""
    parser = argparse.ArgumentParser(prog="torchrelay worker", description="Runs jobs on one device.")
    parser.add_argument("--models", metavar="A,B", help="serve only these models (default: all that have a handler)")
    parser.add_argument(
        "--train", nargs="?", const="only", choices=("no", "also", "only"), default="no",
        help="take training runs: only these, or also, beside inference, which then goes first (default: no)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--name", default=_default_name(), help="the worker's name, unique in the fleet")
    parser.add_argument("--threads", type=_count, default=2, help="threads that preprocess inputs (default: 2)")
    parser.add_argument("--torch-threads", type=_count, help="threads of one forward pass on a CPU (default: torch's)")
    parser.add_argument("--max-loaded", type=_count, help="models loaded at a time (default: what memory takes)")
    parser.add_argument("--max-jobs", type=_count, help="replace the process after so many jobs (default: never)")
    parser.add_argument("--max-memory", type=_count, metavar="MIB", help="replace it above so much memory")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds for the running batch at the end")
    parser.add_argument("--log-level", choices=logs.LEVELS, default="warning")
    found = parser.parse_args(argv)
    if not _NAME.fullmatch(found.name):
        parser.error(f"--name {found.name!r}: 1 to 63 of A-Z a-z 0-9 . _ -")
    if found.train == "only" and found.models:
        parser.error("--train serves no models; `--train also` takes runs beside them")
    models = tuple(dict.fromkeys(m.strip() for m in (found.models or "").split(",") if m.strip())) or None
    return Options(
        name=found.name,
        models=models,
        train=found.train,
        device=found.device,
        threads=found.threads,
        torch_threads=found.torch_threads,
        max_loaded=found.max_loaded,
        max_jobs=found.max_jobs,
        max_memory=found.max_memory,
        grace=found.grace,
        log_level=found.log_level,
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker; return the exit code: 0 ended by a signal, 2 usage, 3 unreachable, else a fault."""
    options = parse(argv)
    logs.configure(options.log_level)
    structlog.contextvars.bind_contextvars(worker=options.name)
    try:
        return Supervisor(Settings.load(), options).run()
    except Unreachable as error:
        print(error, file=sys.stderr)
        return EXIT_UNREACHABLE
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except RelayError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
