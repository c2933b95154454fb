"""Embed the docstrings of Python's standard library and find the nearest to a question."""

from __future__ import annotations

import json
import math
import pydoc
import sys

from torchrelay import Relay

TEXTS = [doc for name in ("json", "math", "sys", "pydoc") for doc in [sys.modules[name].__doc__] if doc]
TEXTS += [doc for doc in (getattr(math, n).__doc__ for n in dir(math)) if doc]
TEXTS += [doc for doc in (json.dumps.__doc__, json.loads.__doc__, pydoc.getdoc(pydoc)) if doc]

if __name__ == "__main__":
    with Relay() as relay:
        question = relay.submit("minilm", "How do I compute a square root?", priority=9)
        batch = relay.submit_batch("minilm", TEXTS)
        vectors = batch.results()
        wanted = question.result(timeout=300)
        scored = ((sum(a * b for a, b in zip(wanted, v, strict=True)), t) for v, t in zip(vectors, TEXTS, strict=True))
        for score, text in sorted(scored, reverse=True)[:3]:
            print(f"{score:.3f}  {text.splitlines()[0]}")
