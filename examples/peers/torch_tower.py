"""Seconds that transformers on torch takes to embed one tile, in bf16: torch_tower.py FOLDER."""

import statistics
import sys
import time

import torch
import transformers

RUNS = 5  # of which the median counts; another before them does not


def main(folder: str) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    size, seconds = model.config.vision_config.image_size, []
    pixels = torch.randn(1, 1, 3, size, size, dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(RUNS + 1):
            started_at = time.perf_counter()
            model.get_image_features(pixels)
            seconds.append(time.perf_counter() - started_at)
    print(statistics.median(seconds[1:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
