"""mosec: batches in order of arrival.  python bench/peers/minilm_mosec_peer.py minilm --setting max_batch=32"""

from __future__ import annotations

import asyncio
import sys

from asked import versions
from serving import IN_FLIGHT, free_port, over_http, process, read, reply

SERVE = sys.argv[1:2] == ["serve"]

asked = read(__doc__, max_batch="32", wait_ms="20")
size = int(asked["max_batch"])

if SERVE:
    import mosec
    from minilm import Encoder

    class Embeddings(mosec.Worker):
        """A text in, its vector out."""

        def __init__(self) -> None:
            self.encoder = Encoder()

        def forward(self, data: list[dict[str, str]] | dict[str, str]) -> object:
            if isinstance(data, dict):  # as mosec has it where a batch is of one
                return {"vector": self.encoder.embed([data["text"]])[0]}
            return [{"vector": vector} for vector in self.encoder.embed([one["text"] for one in data])]


def serve() -> None:
    """Be the server."""
    server = mosec.Server()
    server.append_worker(Embeddings, num=asked.processes, max_batch_size=size, max_wait_time=int(asked["wait_ms"]))
    server.run()


def main() -> None:
    port = free_port()
    command = ["--address", "127.0.0.1", "--port", str(port), "--timeout", "600000", "--capacity", str(4 * IN_FLIGHT)]
    with process(sys.executable, __file__, "serve", *command, "--log-level", "warning") as check:
        url = f"http://127.0.0.1:{port}/inference"
        found = asyncio.run(over_http(asked, url, lambda text: {"text": text}, lambda answer: answer["vector"], check))
    settings = f"max_batch_size {size}, max_wait_time {asked['wait_ms']} ms, HTTP"
    reply(found, version=versions("mosec", "torch"), settings=settings)


if __name__ == "__main__":
    serve() if SERVE else main()
