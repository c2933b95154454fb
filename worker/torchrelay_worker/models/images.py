"""The handler `image-classification`: a picture -> its class; and how a picture becomes a tensor, in training too.

Not here: training (`torchrelay_worker.training.recipes.images`). The program has the normalisation inside.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from torchrelay_storage.errors import InvalidInput
from torchrelay_worker.models.model import Model
from torchrelay_worker.models.weights import Weights

MAX_PIXELS = 50_000_000  # of one picture that is unpacked: a small file may hold a huge one
GREY = (0.299, 0.587, 0.114)  # parts of red, green and blue in the brightness (ITU-R BT.601), as Pillow has them


class ImageClassifier(Model):
    """A torch.export program that takes pictures float32 [n, channels, height, width] to logits [n, classes].

    The config has "height", "width", "channels", "classes", "resize" (whether other sizes are brought to this one) and
    "low" and "high", between which the pixels lay in training.
    """

    max_batch_size = 256
    max_wait_ms = 5

    def load(self, weights: Weights, device: torch.device) -> None:
        """Take the program from the weights, and from the config what pictures it takes."""
        config = weights.config
        self.net = weights.program().to(device)
        self.classes = list(config["classes"])
        self.shape = (int(config["channels"]), int(config["height"]), int(config["width"]))
        self.resize = bool(config["resize"])
        self.low, self.high = float(config["low"]), float(config["high"])

    def preprocess(self, input: Any) -> torch.Tensor:
        """Turn one picture into a tensor of shape [channels, height, width], float32, in the unit of the training.

        Args:
            input: {"image": rows of pixels}, {"pixels": all of them, or rows}, such numbers without the dict, a NumPy
                array or tensor of shape [height, width] or [height, width, 3]; or the bytes of a PNG or JPEG, whose
                levels from 0 to 255 are brought to the range of the training.

        Raises:
            InvalidInput: it is none of these; the message says what is expected.
        """
        if isinstance(input, Mapping):
            if "image" not in input and "pixels" not in input:
                raise InvalidInput(f'the input must have "image" or "pixels": {self._expected()}')
            input = input["image"] if "image" in input else input["pixels"]
        if isinstance(input, bytes):
            wanted = None if self.resize else self.shape[1:]
            levels = fitted(unpack(input, wanted), self.shape[0], self.shape[1:] if self.resize else None).float()
            return levels * ((self.high - self.low) / 255.0) + self.low
        try:
            pixels = torch.as_tensor(input)
            if pixels.dtype != torch.uint8:
                pixels = pixels.float()
        except (TypeError, ValueError, RuntimeError):
            raise InvalidInput(f"the picture must be {self._expected()}") from None
        channels, height, width = self.shape
        if pixels.ndim == 1 and pixels.numel() == channels * height * width:
            pixels = pixels.reshape((height, width) if channels == 1 else (height, width, channels))
        if not _is_picture(pixels) or not (self.resize or tuple(pixels.shape[:2]) == (height, width)):
            raise InvalidInput(f"the picture must be {self._expected()}, not of shape {list(pixels.shape)}")
        self._check_range(pixels)
        return fitted(pixels, channels, (height, width) if self.resize else None).float()

    def _check_range(self, pixels: torch.Tensor) -> None:
        low, high = (bound.item() for bound in torch.aminmax(pixels))
        # Another unit, such as levels to 255 where the training had 0 to 1, would be classified without a word.
        slack = self.high - self.low
        if not self.low - slack <= low <= high <= self.high + slack:  # false for NaN too
            raise InvalidInput(
                f"the pixels must be from about {self.low:g} to {self.high:g}, as in training, "
                f"not from {low:g} to {high:g}"
            )

    def _expected(self) -> str:
        channels, height, width = self.shape
        each = "a number each" if channels == 1 else "three numbers each"
        if self.resize:
            return f"rows of pixels, {each}, or a PNG or JPEG"
        return f"{height} rows of {width} pixels, {each}, or a PNG or JPEG of {width}x{height}"

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest classes [n], int64, and their probabilities [n], float32."""
        probabilities, labels = self.net(batch).softmax(1).max(1)
        return labels, probabilities

    def split(self, outputs: tuple[torch.Tensor, torch.Tensor], n: int) -> list[Any]:
        """Turn both columns into Python numbers at once: faster than picture by picture."""
        labels, probabilities = outputs
        return list(zip(labels.tolist(), probabilities.tolist(), strict=True))

    def decode(self, output: tuple[int, float]) -> dict[str, Any]:
        """Return {"label": the class, "probability": 0.0 to 1.0}."""
        label, probability = output
        return {"label": self.classes[label], "probability": round(probability, 6)}


# --- pictures as tensors ------------------------------------------------------------------------------------


def unpack(data: bytes, wanted: tuple[int, int] | None = None) -> np.ndarray[Any, Any]:
    """Return the picture that is packed in these bytes as uint8 [height, width] or [height, width, 3].

    Args:
        wanted: the height and width that it must have.

    Raises:
        InvalidInput: it is no picture, it is damaged, or it is of another size or too large.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:  # before it is unpacked
                raise InvalidInput(f"the picture has {width}x{height} pixels, more than {MAX_PIXELS}")
            turned = ImageOps.exif_transpose(picture)  # cameras write how they were held
            if wanted is not None and (turned.height, turned.width) != wanted:
                raise InvalidInput(f"the picture must have {wanted[1]}x{wanted[0]} pixels, not {width}x{height}")
            if turned.mode.startswith("I"):  # 16 bits of grey
                return (np.asarray(turned).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            grey = turned.mode in ("1", "L", "LA", "La", "F")
            return np.array(turned.convert("L" if grey else "RGB"))
    except InvalidInput:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidInput(f"the picture has more than {MAX_PIXELS} pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InvalidInput("the bytes are no picture, or it is damaged") from error


def fitted(pixels: np.ndarray[Any, Any] | torch.Tensor, channels: int, size: tuple[int, int] | None) -> torch.Tensor:
    """Return a picture [height, width] or [height, width, 1 or 3] as [channels, height, width], in its dtype.

    Args:
        channels: 1 or 3: colours become brightness, brightness three equal colours.
        size: height and width to resize it to; None: as it is.
    """
    picture = torch.as_tensor(pixels)
    picture = picture.unsqueeze(0) if picture.ndim == 2 else picture.permute(2, 0, 1)
    dtype = picture.dtype
    if size is not None and tuple(picture.shape[1:]) != size:
        grown = functional.interpolate(
            picture.float().unsqueeze(0), size=size, mode="bilinear", antialias=True, align_corners=False
        )
        picture = _as(dtype, grown.squeeze(0))
    if len(picture) == 3 and channels == 1:
        parts = torch.tensor(GREY).reshape(3, 1, 1)
        picture = _as(dtype, (picture.float() * parts).sum(0, keepdim=True))
    elif len(picture) == 1 and channels == 3:
        picture = picture.expand(3, -1, -1)
    return picture


def _as(dtype: torch.dtype, pixels: torch.Tensor) -> torch.Tensor:
    return pixels.to(dtype) if dtype.is_floating_point else pixels.round().to(dtype)


def _is_picture(pixels: torch.Tensor) -> bool:
    return (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3))) and pixels.numel() > 0
