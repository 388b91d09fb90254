"""What transformers makes of a vision model; for the Python of install_peers.sh's `torch`.

vision_peer.py FOLDER INPUTS OUTPUTS. INPUTS, an .npz: `pixels` float32 [N, 3, S, S] and `tokens`
int64 [S]. OUTPUTS, another: `embeddings` float32 [N, tokens, H] and `logits` float32 [S, V].
"""

import sys

import numpy as np
import torch
import transformers


def main(folder: str, inputs: str, outputs: str) -> None:
    arrays = np.load(inputs)
    pixels, tokens = torch.tensor(arrays["pixels"]), torch.tensor(arrays["tokens"])[None]
    model, loaded = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loaded[kind], (kind, loaded[kind])
    if model.config.model_type != "llava":
        pixels = pixels[None]  # of one prompt
    with torch.inference_mode():
        features = torch.cat(model.get_image_features(pixels).pooler_output)
        logits = model(input_ids=tokens, pixel_values=pixels).logits[0]
    embeddings = features.reshape(len(arrays["pixels"]), -1, features.shape[-1])
    np.savez(outputs, embeddings=embeddings.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
