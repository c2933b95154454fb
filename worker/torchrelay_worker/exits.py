"""Exit codes that the inner process and the supervisor agree on."""

from __future__ import annotations

EXIT_USAGE = 2  # it can never start so: no use in trying again
EXIT_LOST = 70  # its device, its supervisor or one of its threads is lost: replace it
EXIT_UNREACHABLE = 3
EXIT_RECYCLE = 75  # it asked to be replaced, and has handed back everything: nobody is to blame
