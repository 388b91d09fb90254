"""What transformers makes of a vision model; for the Python of install_peers.sh's `torch`.

vision_peer.py FOLDER FILE.npz...; to each file with `pixels` float32 [N, 3, S, S] and `tokens`
int64 [S] it writes another, FILE.out.npz: `embeddings` float32 [N, tokens, H] and `logits` float32
[S, V]. Of a prompt with `text` (str) it tells, too, which `pixels` and `tokens` come of the text,
`image_0`, `image_1` and so on (uint8 [height, width, 3]), and `splits` (bool) for Idefics3.
"""

import sys
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image


def main(folder: str, *files: str) -> None:
    model, loaded = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loaded[kind], (kind, loaded[kind])
    for file in files:
        arrays = dict(np.load(file))
        found = evaluate(model, arrays["pixels"], arrays["tokens"])
        if "text" in arrays:
            found |= process(folder, **arrays)
        np.savez(file.replace(".npz", ".out.npz"), **found)


def evaluate(model: Any, pixels: Any, tokens: Any) -> dict[str, Any]:
    values = torch.tensor(pixels)
    if model.config.model_type != "llava":
        values = values[None]  # of one prompt
    with torch.inference_mode():
        features = torch.cat(model.get_image_features(values).pooler_output)
        logits = model(input_ids=torch.tensor(tokens)[None], pixel_values=values).logits[0]
    embeddings = features.reshape(len(pixels), -1, features.shape[-1])
    return {"embeddings": embeddings.numpy(), "logits": logits.numpy()}


def process(folder: str, text: Any, splits: Any, **arrays: Any) -> dict[str, Any]:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    images = [Image.fromarray(array) for name, array in arrays.items() if "image_" in name]
    is_llava = "Llava" in type(processor).__name__
    options = {} if is_llava else {"do_image_splitting": bool(splits)}
    found = processor(images=images, text=str(text), return_tensors="np", **options)
    pixels = found["pixel_values"]
    return {"pixels": pixels if is_llava else pixels[0], "tokens": found["input_ids"][0]}


if __name__ == "__main__":
    main(*sys.argv[1:])
