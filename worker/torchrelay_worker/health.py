"""`python -m torchrelay_worker.health`: exit 0 if a worker of this host is alive, 1 if none is, 3 if the database is
out of reach. For container health checks; it loads neither torch nor Celery. Not here: how a worker shows it is alive.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence

from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, RelayError
from torchrelay_storage.fleet import Fleet

ALIVE, NONE_ALIVE, USAGE, UNREACHABLE = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Look into the fleet's table, say what stands there in one line, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m torchrelay_worker.health", description="Is a worker alive here?")
    parser.add_argument("--name", help="only this worker; without it, any worker of this host")
    name = parser.parse_args(arguments).name
    try:
        settings = Settings.load()
        database = Database(settings.database_url, pool_size=1)
        try:
            rows = Fleet(database).workers(settings.stale_after)
        finally:
            database.dispose()
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return USAGE
    except RelayError as error:
        print(error, file=sys.stderr)
        return UNREACHABLE
    host = socket.gethostname()
    ours = [row for row in rows if (row.name == name if name else row.host == host)]
    alive = [row for row in ours if row.alive]
    if alive:
        print(f"{alive[0].name} is alive")
        return ALIVE
    who = f"worker {name}" if name else f"worker of {host}"
    print(f"no {who} is alive; {len(ours)} were seen", file=sys.stderr)
    return NONE_ALIVE


if __name__ == "__main__":
    sys.exit(main())
