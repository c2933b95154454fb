"""The handler of examples/embeddings, as it is, for a worker that has only bench/ on its path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "embeddings"))

from model import MAX_TOKENS, Embeddings, folder

__all__ = ["MAX_TOKENS", "Embeddings", "folder"]
