"""ImageReader: puts the tiles of images into prompts, in the place of their markers."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakValueDictionary

from sf_local.artifact.manifest import ImageSettings
from sf_local.errors import MismatchError, RequestError
from sf_local.request.prompt import CutImage, Prompt, Span, Tile
from sf_local.text.tokenizer import Tokenizer
from sf_local.vision.image_file import GivenImage, ImageInput
from sf_local.vision.processor import ImageProcessor

MAX_TOKENS = 1 << 16  # that a tile can have
MAX_CUTTING = 2  # images that are cut at a time: one of 64 megapixels takes nearly 1 GiB


class ImageCache:
    """Cut images by key: all that prompts show now, and the last ones used.

    The latter take up to about `max_bytes`. Usable from any thread.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._images: OrderedDict[bytes, CutImage] = OrderedDict()
        self._shown: WeakValueDictionary[bytes, CutImage] = WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> CutImage | None:
        """The image of a key, which counts as a use, or None."""
        with self._lock:
            found = self._shown.get(key)
            return None if found is None else self._keep(key, found)

    def add(self, key: bytes, image: CutImage) -> CutImage:
        """Add an image, and return the one to use: another thread may have added it before."""
        with self._lock:
            return self._keep(key, self._shown.setdefault(key, image))

    def _keep(self, key: bytes, image: CutImage) -> CutImage:
        self._images[key] = image
        self._images.move_to_end(key)
        self._trim()
        return image

    def _trim(self) -> None:
        """Drop the least recently used; all are measured again, as encoding changes their size."""
        sizes = {key: image.num_bytes for key, image in self._images.items()}
        num_bytes = sum(sizes.values())
        while num_bytes > self._max_bytes and len(self._images) > 1:
            key, _ = self._images.popitem(last=False)
            num_bytes -= sizes[key]


class ImageReader:
    """Puts images into prompts of one model; usable from any thread.

    max_bytes: memory for images that no prompt shows. allow_urls: fetch http(s) URLs. Raises
    MismatchError if the tokenizer does not know the model's image token.
    """

    def __init__(
        self, settings: ImageSettings, tokenizer: Tokenizer, max_bytes: int, allow_urls: bool
    ) -> None:
        self._settings, self._tokenizer = settings, tokenizer
        self._processor = ImageProcessor(settings)
        self._cache, self._allow_urls = ImageCache(max_bytes), allow_urls
        self._cutting = threading.BoundedSemaphore(MAX_CUTTING)
        self._markers: dict[tuple[int, int], list[int]] = {}  # by grid
        token, ids = settings.image_token, self._encode(settings.image_token * 2)
        if ids != [settings.image_token_id] * 2:
            raise MismatchError(
                f"the tokenizer reads {token * 2!r} as {ids}, not as the model's image token "
                f"{settings.image_token_id} twice; use the tokenizer that came with the model"
            )

    def given(self, image: ImageInput) -> GivenImage:
        """An image that can be given to several prompts, and is read once for all of them."""
        return image if isinstance(image, GivenImage) else GivenImage(image, self._allow_urls)

    def expand(
        self, ids: list[int], images: Sequence[ImageInput], max_tokens: int,
        deadline: float | None = None,
    ) -> Prompt:  # fmt: skip
        """The Prompt of token ids, with the tiles of `images` in the place of the markers.

        Raises ImageError for an image that cannot be used, and RequestError unless there is one
        image for each marker, they fit into `max_tokens`, and all are cut before the deadline, a
        `time.perf_counter()`.
        """
        token = self._settings.image_token_id
        num_markers = ids.count(token)
        if num_markers != len(images):
            raise RequestError(
                f"images: there are {len(images)}, and {num_markers} markers in the prompt; put "
                f"{self._settings.image_token} where each image belongs, and nowhere else"
            )
        if not images:
            return Prompt(ids, ids)
        cut = self._cut_all(images, max_tokens, deadline)
        prompt, markers = Prompt([], [], unexpanded=ids), iter(cut)
        for part in ids:
            if part == token:
                self._append(prompt, next(markers))
            else:
                prompt.ids.append(part)
                prompt.keys.append(part)
        return prompt

    def _cut_all(
        self, images: Sequence[ImageInput], max_tokens: int, deadline: float | None
    ) -> list[CutImage]:
        """Cut images, but not those after the first that does not fit."""
        cut: list[CutImage] = []
        for image in images:
            self._check_room(cut, images, max_tokens)
            cut.append(self._cut(image, deadline))
        self._check_room(cut, images, max_tokens)
        return cut

    def _check_room(
        self, cut: Sequence[CutImage], images: Sequence[ImageInput], max_tokens: int
    ) -> None:
        """Raise RequestError if the images do not fit, with one tile for each that is not cut."""
        num_tiles = sum(len(image.tiles) for image in cut) + len(images) - len(cut)
        if (least := num_tiles * self._settings.tokens_per_tile) > max_tokens:
            raise RequestError(
                f"images: {len(images)} of them take {least} tokens or more, and the context is "
                f"{max_tokens}: no room for an answer; give fewer"
            )

    def _append(self, prompt: Prompt, image: CutImage) -> None:
        """Append the text of an image, with its tiles."""
        count, token, seen = self._settings.tokens_per_tile, self._settings.image_token_id, 0
        for part in self._marker_ids(image.rows, image.columns):
            key = part
            if part == token:
                tile, offset = divmod(seen, count)
                key = -1 - (((image.number << 16) + tile) * MAX_TOKENS + offset)
                if not offset:
                    start = len(prompt.ids)
                    prompt.spans.append(Span(start, start + count, image.tiles[tile], image))
                seen += 1
            prompt.ids.append(part)
            prompt.keys.append(key)
        assert seen == count * len(image.tiles)

    def _marker_ids(self, rows: int, columns: int) -> list[int]:
        """Token ids of the text of an image with this grid."""
        if (rows, columns) not in self._markers:
            text = self._processor.marker_text(rows, columns)
            self._markers[rows, columns] = self._encode(text)
        return self._markers[rows, columns]

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text, without the token that prompts begin with."""
        ids = self._tokenizer.encode(text)
        return ids[1:] if ids[0] == self._tokenizer.bos_token_id else ids

    def _cut(self, image: ImageInput, deadline: float | None) -> CutImage:
        """The tiles of an image, cut unless they are in the cache."""
        given = self.given(image)
        given.read(deadline)
        if (found := self._cache.get(given.key)) is not None:
            return found
        with self._permit(deadline):
            if (found := self._cache.get(given.key)) is not None:
                return found
            tiles = self._processor.tiles(given.pixels())
            number = int.from_bytes(given.key, "little")
            # Copied, so that each tile's memory is freed on its own.
            parts = tuple(Tile(pixels.copy()) for pixels in tiles.pixels)
            return self._cache.add(given.key, CutImage(tiles.rows, tiles.columns, parts, number))

    @contextmanager
    def _permit(self, deadline: float | None) -> Iterator[None]:
        """One of the places for images that are cut; raises RequestError at the deadline."""
        seconds = None if deadline is None else max(0.0, deadline - time.perf_counter())
        if not self._cutting.acquire(timeout=seconds):
            raise RequestError(
                "timeout: it passed while an image waited for others to be decoded; give more "
                "time, or fewer or smaller images at once"
            )
        try:
            yield
        finally:
            self._cutting.release()
