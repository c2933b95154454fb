"""Infinity: sorts what waits by length.  python bench/peers/minilm_infinity_peer.py minilm --setting max_batch=32

`lengths` is what it sorts by: `characters`, as it comes, or `tokens`, which it then counts for each text first.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from asked import versions
from minilm import folder
from serving import IN_FLIGHT, free_port, over_http, process, read, reply

asked = read(__doc__, max_batch="32", lengths="tokens")


def main() -> None:
    port = free_port()
    command = [str(Path(sys.executable).with_name("infinity_emb")), "v2", "--model-id", folder(), "--engine", "torch"]
    command += ["--served-model-name", "minilm", "--batch-size", asked["max_batch"], "--device", "cpu"]
    command += ["--dtype", "float32", "--no-compile", "--no-bettertransformer", "--pooling-method", "mean"]
    command += ["--lengths-via-tokenize" if asked["lengths"] == "tokens" else "--no-lengths-via-tokenize"]
    command += ["--no-model-warmup", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    assert asked.processes == 1, "it has one worker a device"
    with process(*command, INFINITY_QUEUE_SIZE=str(64 * IN_FLIGHT), INFINITY_ANONYMOUS_USAGE_STATS="0") as check:
        url = f"http://127.0.0.1:{port}/embeddings"
        found = asyncio.run(
            over_http(
                asked,
                url,
                lambda text: {"model": "minilm", "input": [text]},
                lambda answer: answer["data"][0]["embedding"],
                check,
            )
        )
    settings = f"batch_size {asked['max_batch']}, sorted by {asked['lengths']}, float32, HTTP"
    reply(found, version=versions("infinity-emb", "torch", "transformers"), settings=settings)


if __name__ == "__main__":
    main()
