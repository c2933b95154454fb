"""The handler `digits`: 8x8 pictures of handwritten digits -> which digit, and how sure. The demo's model."""

from __future__ import annotations

import io
from typing import Any

import torch

from torchrelay_storage.errors import InvalidInput
from torchrelay_worker.models.model import Model
from torchrelay_worker.models.weights import Weights

SIDE = 8  # pixels
BRIGHTEST = 16.0  # scikit-learn's digits have whole grey levels from 0 to 16
_LEVELS = bytes(range(int(BRIGHTEST) + 1))


class Digits(Model):
    """A torch.export program that takes pictures of shape [n, 1, 8, 8], float32 from 0 to 1, to logits [n, 10]."""

    max_batch_size = 512
    max_wait_ms = 5

    def load(self, weights: Weights, device: torch.device) -> None:
        """Take the program from the weights."""
        self.net = weights.program().to(device)

    def preprocess(self, input: Any) -> torch.Tensor | bytes:
        """Turn one picture into a tensor of shape [1, 8, 8], float32 from 0 to 1, or into 64 bytes from 0 to 16.

        The latter where it comes as a list of 64 whole numbers: at a twentieth of the cost of a tensor.

        Args:
            input: {"pixels": 64 numbers or 8 rows of 8}, such numbers without the dict, a NumPy array or tensor of
                64 or 8x8 numbers (all of them from 0 to 16), or the bytes of a PNG or JPEG of 8x8 pixels.

        Raises:
            InvalidInput: it is none of these; the message says what is wrong.
        """
        if isinstance(input, bytes):
            return _picture(input)
        pixels = input
        if isinstance(input, dict):
            if "pixels" not in input:
                raise InvalidInput('the input must have "pixels", 64 numbers from 0 to 16')
            pixels = input["pixels"]
        if type(pixels) is list and len(pixels) == SIDE * SIDE:
            try:
                grey = bytes(pixels)
            except (TypeError, ValueError):
                pass  # fractions are as good; what is no picture is told below
            else:
                if not grey.translate(None, _LEVELS):
                    return grey
        try:
            tensor = torch.as_tensor(pixels, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise InvalidInput("pixels must be 64 numbers from 0 to 16, or 8 rows of 8") from None
        if tensor.shape not in ((SIDE * SIDE,), (SIDE, SIDE)):
            raise InvalidInput(f"pixels must be 64 numbers or 8 rows of 8, not of shape {list(tensor.shape)}")
        low, high = torch.aminmax(tensor)
        if not 0.0 <= low.item() <= high.item() <= BRIGHTEST:  # false for NaN too
            raise InvalidInput(f"pixels must be from 0 to {BRIGHTEST:g}, not from {low.item():g} to {high.item():g}")
        return tensor.reshape(1, SIDE, SIDE) / BRIGHTEST

    def collate(self, prepared: list[Any]) -> torch.Tensor:
        """Make one tensor of shape [n, 1, 8, 8], float32 from 0 to 1."""
        if set(map(type, prepared)) == {bytes}:
            return _grey(b"".join(prepared))
        pictures: torch.Tensor = super().collate([_grey(p)[0] if isinstance(p, bytes) else p for p in prepared])
        return pictures

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest digits [n], int64, and their probabilities [n], float32."""
        probabilities, labels = self.net(batch).softmax(1).max(1)
        return labels, probabilities

    def split(self, outputs: tuple[torch.Tensor, torch.Tensor], n: int) -> list[Any]:
        """Turn both columns into Python numbers at once: faster than picture by picture."""
        labels, probabilities = outputs
        return list(zip(labels.tolist(), probabilities.tolist(), strict=True))

    def decode(self, output: tuple[int, float]) -> dict[str, Any]:
        """Return {"label": 0 to 9, "probability": 0.0 to 1.0}."""
        label, probability = output
        return {"label": label, "probability": round(probability, 6)}


def _grey(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, 1, SIDE, SIDE) / BRIGHTEST


def _picture(data: bytes) -> torch.Tensor:
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        size = picture.size
        if size != (SIDE, SIDE):  # before it is unpacked: a small file may hold a huge picture
            raise InvalidInput(f"the picture must have {SIDE}x{SIDE} pixels, not {size[0]}x{size[1]}")
        grey = bytes(picture.convert("L").tobytes())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise InvalidInput("the bytes are no PNG or JPEG picture") from None
    return torch.frombuffer(bytearray(grey), dtype=torch.uint8).reshape(1, SIDE, SIDE) / 255.0
