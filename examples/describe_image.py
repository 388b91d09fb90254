"""Two questions about one picture; then a choice and a number, each in a fork of the conversation.

    describe_image.py [IMAGE]

It needs a vision model: SmolVLM-256M-Instruct (0.5 GB) from Hugging Face or from a folder (--model
FOLDER), compiled on first use; or an artifact (--vmfb). --random goes through the same steps on a
small model with random weights, which answers noise. Without IMAGE it draws a picture.
"""

import argparse
import sys
from pathlib import Path

import sglang as sgl
from common import checked
from PIL import Image, ImageDraw

from sf_local import from_source
from sf_local.errors import SourceError

MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"
MISSING = """describe_image.py needs the weights of a model that sees.
{error}

Where there is a network:  hf download {model} --local-dir smolvlm   (0.5 GB)
then here:                 describe_image.py --model smolvlm
Without any weights:       describe_image.py --random"""
QUESTIONS = {
    "what": "What is in this picture?",
    "where": "Where is the sun?",
    "kind": "Is this a photo or a drawing?",
    "count": "How many houses are there? Answer with a number.",
}


@sgl.function
def look(s, image):
    s += sgl.user(sgl.image(image) + QUESTIONS["what"])
    s += sgl.assistant(sgl.gen("what", max_tokens=48, temperature=0))
    s += sgl.user(QUESTIONS["where"])
    s += sgl.assistant(sgl.gen("where", max_tokens=48, temperature=0))
    kind, count = s.fork(2)
    kind += sgl.user(QUESTIONS["kind"])
    kind += sgl.assistant(sgl.select("kind", ["photo", "drawing"]))
    count += sgl.user(QUESTIONS["count"])
    count += sgl.assistant(sgl.gen("count", regex="[0-9]{1,2}", temperature=0))
    s["kind"], s["count"] = kind["kind"], count["count"]


def drawing() -> Image.Image:
    """A red house in a green field under a yellow sun."""
    image = Image.new("RGB", (640, 480), "skyblue")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 320, 640, 480), "green")
    draw.ellipse((480, 40, 580, 140), "yellow")
    draw.rectangle((180, 220, 380, 380), "red")
    draw.polygon([(150, 220), (410, 220), (280, 120)], "brown")
    return image


def main() -> None:
    args = _parser().parse_args()
    with sgl.ShortfinLocal(vmfb=args.vmfb or _artifact(args), device=args.device) as backend:
        state = checked(look.run(image=args.image or drawing(), backend=backend))
    if args.random:
        print("Random weights: the answers are noise.\n")
    for name, question in QUESTIONS.items():
        print(f"Q: {question}\nA: {state[name]}")
        if name in ("what", "where"):
            meta = state.get_meta_info(name)
            print(f"   [{meta['prompt_tokens']} tokens, {meta['cached_tokens']} of them cached; "
                  f"first token after {meta['time_to_first_token'] * 1000:.0f} ms]")  # fmt: skip


def _artifact(args: argparse.Namespace) -> Path:
    if args.random:
        from random_smolvlm import SMALL, random_smolvlm

        return from_source(random_smolvlm(SMALL), args.device, progress=True)
    try:
        return from_source(args.model, args.device, progress=True)
    except SourceError as error:
        sys.exit(MISSING.format(error=error, model=MODEL))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="a file")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default=MODEL, help="folder or id (default: %(default)s)")
    source.add_argument("--vmfb", help="artifact folder")
    source.add_argument("--random", action="store_true", help="a small model of random weights")
    parser.add_argument("--device", default="cpu", help="cpu, hip or hip:N")
    return parser


if __name__ == "__main__":
    main()
