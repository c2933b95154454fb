"""Texts of mixed length, the same for ours, the limits and the peers: docstrings of Python's standard library.

Of this Python alone, without a package: peers run by another environment's Python of the same version have the same
texts, and `digest` shows that they do. MiniLM has some 71 tokens for one on average, half of them below 42, one in
fifteen at the 256 where it cuts.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice

SEED = 292  # of the first four hundred the one whose first 50, 100, ... 1,000 texts are nearest to the mean of all
FURTHER = 0.38  # how likely a text goes on with one more docstring
MOST = 8  # docstrings of one text

MODULES = """
    abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmd code codecs collections
    collections.abc colorsys compileall concurrent.futures configparser contextlib copy csv ctypes dataclasses datetime
    decimal difflib dis doctest email email.message email.policy enum errno fileinput fnmatch fractions ftplib functools
    gc getpass gettext glob gzip hashlib heapq hmac html html.parser http.client http.cookiejar http.server imaplib
    importlib inspect io ipaddress itertools json linecache locale logging logging.config logging.handlers lzma mailbox
    math mimetypes mmap multiprocessing netrc numbers operator optparse os pathlib pdb pickle pickletools pkgutil
    platform plistlib poplib pprint profile pstats pydoc queue random re reprlib sched secrets select selectors shelve
    shlex shutil signal smtplib socket socketserver sqlite3 ssl stat statistics string struct subprocess sys sysconfig
    tarfile tempfile textwrap threading time timeit tokenize trace traceback types typing unittest unittest.mock
    urllib.error urllib.parse urllib.request uuid venv warnings wave weakref webbrowser xml.dom.minidom
    xml.etree.ElementTree xml.sax xmlrpc.client zipapp zipfile zlib
"""


def texts(n: int, seed: int = SEED) -> list[str]:
    """Return n texts; fewer texts are the first ones of more."""
    return list(islice(_endless(docstrings(), random.Random(seed)), n))


def digest(some: Sequence[str]) -> str:
    """Return what tells these texts from others."""
    return hashlib.sha256("\0".join(some).encode()).hexdigest()[:12]


@cache
def docstrings() -> list[str]:
    """Return each docstring of the modules above, of their classes and functions, once, sorted.

    Read by a Python of its own: what a module holds depends on what else was imported before.
    """
    command = [sys.executable, "-I", "-S", __file__]
    return list(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def _read() -> list[str]:
    found: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODULES.split():
            try:
                module = importlib.import_module(name)
            except ImportError:  # a Python built without it
                continue
            for member in (module, *vars(module).values()):
                found.update(_docs(member))
    return sorted(found)


def _docs(member: object) -> Iterator[str]:
    inner = vars(member).values() if isinstance(member, type) else ()
    for one in (member, *inner):
        doc = getattr(one, "__doc__", None)
        if isinstance(doc, str) and doc.strip():
            yield inspect.cleandoc(doc)


def _endless(docs: Sequence[str], chance: random.Random) -> Iterator[str]:
    deck: list[str] = []
    while True:
        parts: list[str] = []
        while not parts or (len(parts) < MOST and chance.random() < FURTHER):
            if not deck:  # each docstring comes once before any comes again
                deck = chance.sample(docs, len(docs))
            parts.append(deck.pop())
        yield "\n\n".join(parts)


if __name__ == "__main__":
    print(json.dumps(_read()))
