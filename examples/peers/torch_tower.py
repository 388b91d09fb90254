"""A vision tower in transformers on torch, in bf16: `torch_tower.py FOLDER TOKENS THREADS`."""

import sys

import torch
from transformers import AutoModelForImageTextToText
from worker import seconds, serve

torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
size = model.config.vision_config.image_size
pixels = torch.randn(1, 1, 3, size, size, dtype=torch.bfloat16)


def warm(_: list[int]) -> None:
    encode()


@torch.inference_mode()
def encode() -> float:
    """Seconds to embed a tile."""
    return seconds(lambda: model.get_image_features(pixels))


serve({f.__name__: f for f in (warm, encode)})
