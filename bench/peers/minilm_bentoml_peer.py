"""BentoML: batches in order of arrival.  python bench/peers/minilm_bentoml_peer.py minilm --setting max_batch=32"""

from __future__ import annotations

import asyncio
import sys
import tempfile

from asked import versions
from serving import IN_FLIGHT, free_port, over_http, process, read, reply

SERVE = __name__ != "__main__"  # imported by `bentoml serve`

asked = read(__doc__, max_batch="32", max_latency_ms="600000")
size = int(asked["max_batch"])

if SERVE:
    import bentoml
    from minilm import Encoder

    @bentoml.service(
        workers=asked.processes,
        threads=1,
        traffic={"timeout": 600, "max_concurrency": 4 * IN_FLIGHT},
        metrics={"enabled": False},
    )
    class Embeddings:
        """A text in, its vector out."""

        def __init__(self) -> None:
            self.encoder = Encoder()

        if size > 1:

            @bentoml.api(batchable=True, max_batch_size=size, max_latency_ms=int(asked["max_latency_ms"]))
            def embed(self, texts: list[str]) -> list[list[float]]:
                return self.encoder.embed(texts)

        else:

            @bentoml.api
            def embed(self, texts: list[str]) -> list[list[float]]:
                return self.encoder.embed(texts)


def main() -> None:
    port = free_port()
    command = [sys.executable, "-m", "bentoml", "serve", "minilm_bentoml_peer:Embeddings", "--quiet"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (
        tempfile.TemporaryDirectory(prefix="bench-bentoml-") as home,
        process(*command, BENTOML_HOME=home) as check,
    ):
        url = f"http://127.0.0.1:{port}/embed"
        found = asyncio.run(over_http(asked, url, lambda text: {"texts": [text]}, lambda answer: answer[0], check))
    settings = f"max_batch_size {size}, max_latency_ms {asked['max_latency_ms']}" if size > 1 else "not batchable"
    reply(found, version=versions("bentoml", "torch"), settings=f"{settings}, 1 thread, HTTP")


if __name__ == "__main__":
    main()
