"""LitServe: batches in order of arrival.  python bench/peers/minilm_litserve_peer.py minilm --setting max_batch=32"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from asked import versions
from serving import free_port, over_http, process, read, reply

SERVE = sys.argv[1:2] == ["serve"]

asked = read(__doc__, max_batch="32", wait_ms="20")
size = int(asked["max_batch"])

if SERVE:
    import litserve
    from minilm import Encoder

    class Embeddings(litserve.LitAPI):
        """A text in, its vector out."""

        def setup(self, device: str) -> None:
            self.encoder = Encoder()

        def decode_request(self, request: dict[str, str]) -> str:
            return request["text"]

        def batch(self, inputs: list[str]) -> list[str]:
            return list(inputs)

        def predict(self, texts: Any) -> Any:
            return self.encoder.embed(texts) if size > 1 else self.encoder.embed([texts])[0]

        def unbatch(self, output: Any) -> Any:
            return list(output)

        def encode_response(self, output: list[float]) -> dict[str, list[float]]:
            return {"vector": output}


def serve(port: int) -> None:
    """Be the server."""
    api = Embeddings(max_batch_size=size, batch_timeout=int(asked["wait_ms"]) / 1000 if size > 1 else 0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=asked.processes, timeout=False)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")


def main() -> None:
    port = free_port()
    with process(sys.executable, __file__, "serve", str(port)) as check:
        url = f"http://127.0.0.1:{port}/predict"
        found = asyncio.run(over_http(asked, url, lambda text: {"text": text}, lambda answer: answer["vector"], check))
    settings = f"max_batch_size {size}, batch_timeout {asked['wait_ms'] if size > 1 else 0} ms, HTTP"
    reply(found, version=versions("litserve", "torch"), settings=settings)


if __name__ == "__main__":
    serve(int(sys.argv[2])) if SERVE else main()
