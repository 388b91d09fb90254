"""What images cost: a picture as one tile, and a larger one that the model cuts into 17.

    bench_images.py [ARTIFACT | --peers FOLDER] [--rounds 3] [--json FILE]

By default the model is SmolVLM-256M's shape with random weights, built once. It scales a picture of
1024 x 1024 pixels to 4 x 4 tiles and one tile of the whole: 17. Each round has new pictures. A
"seen" picture is one whose embeddings are kept, but not its keys and values. With --peers, the
folder that install_peers.sh made, transformers on torch embeds a tile in each round as well.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench_peers import Job, Worker, peer_worker
from PIL import Image
from random_smolvlm import SMOLVLM_256M, random_smolvlm

from sf_local import Engine, SamplingParams
from sf_local.artifact.manifest import ImageSettings
from sf_local.artifact.open import Artifact
from sf_local.bench.engine_costs import stream_gap
from sf_local.bench.measurements import report
from sf_local.bench.report import Figure, table
from sf_local.bench.roofline import encode_flops, peak_flops
from sf_local.errors import RequestError, SfLocalError
from sf_local.request.output import Output
from sf_local.vision.reader import ImageReader

FIRST, SECOND = "What is it?", "Which colours does it have?"
ENCODE = Job("encode", lambda rng: [])
LAST = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)
FLOATS = ("f32", "f16", "bf16")


def measure(engine: Engine, settings: ImageSettings, image: Image.Image) -> list[Figure]:
    """Of a picture that nobody has seen before."""
    reader = ImageReader(settings, engine.tokenizer, 1 << 30, allow_urls=False)

    def ask(question: str) -> tuple[float, Output]:
        """Seconds to the first token, preparation of the picture included."""
        started_at = time.perf_counter()
        ids = engine.encode(settings.image_token + question)
        prompt = reader.expand(ids, [image], engine.max_tokens)
        output = engine.generate(prompt, LAST)
        return time.perf_counter() - started_at, output

    engine.flush_cache()
    before = engine.stats()
    cold, _ = ask(FIRST)
    after = engine.stats()
    engine.flush_cache()
    seen, prefilled = ask(FIRST)
    second, cached = ask(SECOND)
    num_tiles = after["encoded_tiles"] - before["encoded_tiles"]
    encode = after["encode_seconds"] - before["encode_seconds"]
    name = f"{num_tiles:.0f} tile{'s' * (num_tiles > 1)}"
    num_tokens, prefill = prefilled.prompt_tokens, prefilled.time_to_first_token
    return [
        Figure(f"{name}: encode", 1e3 * encode, "ms"),
        *_share(engine.artifact, f"{name}: encode", num_tiles / encode),
        Figure(f"{name}: prefill, {num_tokens} tokens", 1e3 * prefill, "ms"),
        Figure(f"{name}: prefill, {num_tokens} tokens, rate", num_tokens / prefill, "tokens/s"),
        Figure(f"{name}: first token, cold", 1e3 * cold, "ms"),
        Figure(f"{name}: first token, seen", 1e3 * seen, "ms"),
        Figure(f"{name}: first token, second question", 1e3 * second, "ms"),
        Figure(f"{name}: second question, cached tokens", cached.cached_tokens, "tokens"),
    ]


def _share(artifact: Artifact, name: str, rate: float) -> list[Figure]:
    """Multiplications and additions of the tower, over what the CPU's registers can do."""
    manifest = artifact.manifest
    if not (manifest and manifest.device == "cpu"):
        return []
    # of quantized weights the tower's are not
    is_float = manifest.weight_dtype in FLOATS
    peak = peak_flops(manifest.weight_dtype if is_float else manifest.kv_dtype)
    flops = rate * encode_flops(artifact)
    return [
        Figure(f"{name}, rate", flops / 1e9, "GFLOP/s"),
        Figure(f"peak of {peak.name}", peak.flops / 1e9, "GFLOP/s"),
        Figure(f"{name}: share of peak of {peak.name}", 100 * flops / peak.flops, "%"),
    ]


def run(engine: Engine, rounds: int, torch: Worker | None = None) -> list[Figure]:
    """Round 0 is not counted: it reads the weights."""
    manifest = engine.artifact.manifest
    if not (manifest and manifest.images):
        raise RequestError(f"{engine.artifact.name} is a text model; give one that sees")
    settings, rng = ImageSettings(**manifest.images), random.Random(0)
    cases = {settings.tile_size: replace(settings, splits=False)}
    if settings.splits:
        cases[2 * settings.tile_size] = settings
    figures = []
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr)
        for size, case in cases.items():
            found = measure(engine, case, _noise(rng, size))
            figures += found if number else []
        if number:
            picture = _noise(rng, 2 * settings.tile_size)
            gap = stream_gap(engine, engine.prepare(settings.image_token, [picture]))
            figures.append(Figure("longest gap of a stream beside a picture", 1e3 * gap, "ms"))
        if torch and number:
            milliseconds = 1e3 * torch.measure(ENCODE, [])
            figures.append(Figure("1 tile: encode, transformers on torch", milliseconds, "ms"))
    return figures


def _noise(rng: random.Random, size: int) -> Image.Image:
    pixels = rng.randbytes(3 * 16 * 16)
    return Image.frombytes("RGB", (16, 16), pixels).resize((size, size))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what seeing costs")
    parser.add_argument("artifact", nargs="?", help="default: SmolVLM-256M's shape, random")
    parser.add_argument(
        "--peers", metavar="FOLDER", type=Path, help="with torch, which embeds, too"
    )
    parser.add_argument("--device", default="cpu", help="cpu, hip or hip:N")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every value there")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    if args.peers and args.artifact:
        parser.error("--peers is for the default model: leave out ARTIFACT")
    torch = args.peers and peer_worker(
        args.peers, "transformers", "torch_tower.py", lambda: random_smolvlm(SMOLVLM_256M)
    )
    if isinstance(torch, str):
        parser.error(f"--peers {args.peers}: {torch}; run install_peers.sh {args.peers} torch")
    if torch:
        torch.is_model = False  # of the capital of France it knows nothing
    try:
        source = args.artifact or random_smolvlm(SMOLVLM_256M)
        with Engine.from_source(source, args.device, progress=True) as engine:
            figures = run(engine, args.rounds, torch)
            found = report(engine.artifact, args.device, args.rounds, figures)
    except (SfLocalError, RuntimeError) as error:
        parser.error(str(error))
    finally:
        if torch:
            torch.close()
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
