"""Llama 4's images, for which transformers has code of torchvision alone: its sizes as a table, its pixels by torch's own
operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

TILE, MOST = 56, 4
LEVEL = 2 / 255 + 2**-8
"""One level of 256, and what bfloat16 rounds at most."""
SIZES: dict[tuple[int, int], dict[tuple[int, int], tuple[int, int, int, int]]] = {
    (56, 4): {
        (1, 1): (1, 1, 56, 56), (5, 300): (4, 1, 224, 3), (140, 84): (2, 2, 67, 112), (333, 217): (2, 2, 72, 112),
        (640, 480): (2, 2, 84, 112), (999, 5): (1, 4, 1, 224), (56, 56): (1, 1, 56, 56), (112, 57): (2, 2, 57, 112),
        (60, 130): (3, 1, 121, 56),
    },
    (336, 16): {
        (1, 1): (1, 1, 336, 336), (336, 336): (1, 1, 336, 336), (337, 336): (1, 2, 336, 337), (640, 480): (2, 2, 480, 640),
        (1920, 1080): (3, 5, 945, 1680), (1080, 1920): (5, 3, 1680, 945), (4000, 3000): (3, 4, 1008, 1344),
        (5000, 100): (1, 15, 100, 5000), (100, 5000): (15, 1, 5000, 100), (672, 1008): (3, 2, 1008, 672),
        (1500, 1499): (4, 4, 1343, 1344), (335, 2017): (7, 1, 2017, 335), (200, 1): (1, 1, 1, 336),
    },
}  # fmt: skip
"""(tile, most) -> (width, height) of an image -> rows and columns of its canvas, height and width on it: as transformers 5.24 with
torchvision 0.28 says (`get_best_fit`, `get_max_res_without_distortion`)."""


def by_torch(image: Image.Image) -> np.ndarray:
    """float32 [tiles, 3, 56, 56], as transformers' processor does it: scaled as uint8, normalized in bfloat16."""
    import torch

    rows, columns, high, wide = SIZES[TILE, MOST][image.size]
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]

    def scaled(height: int, width: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)

    canvas = torch.zeros((1, 3, rows * TILE, columns * TILE), dtype=torch.uint8)
    canvas[:, :, :high, :wide] = scaled(high, wide)
    tiles = canvas.reshape(3, rows, TILE, columns, TILE).permute(1, 3, 0, 2, 4).reshape(-1, 3, TILE, TILE)
    if len(tiles) > 1:
        tiles = torch.cat([tiles, scaled(TILE, TILE)])
    half = torch.tensor(0.5, dtype=torch.bfloat16)
    return ((tiles.to(torch.bfloat16) * (1 / 255) - half) / half).float().numpy()


def read(images: Sequence[Image.Image], hf: dict[str, Any]) -> dict[str, Any]:
    """What a model of transformers is given: our own pixels, so that what is made of them can be compared."""
    import torch

    from serving.media.processors import PROCESSORS

    made = [PROCESSORS["Llama4ForConditionalGeneration"](hf).pieces(image)[0] for image in images]
    patch = hf["vision_config"]["patch_size"]
    side = TILE // patch
    cut = np.concatenate([one.patches_PX for one in made]).reshape(-1, side, side, 3, patch, patch)
    pixels = cut.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, TILE, TILE)
    grids = [SIZES[TILE, MOST][image.size][:2] for image in images]
    return {"pixel_values": torch.from_numpy(np.ascontiguousarray(pixels)), "aspect_ratios": torch.tensor(grids)}
