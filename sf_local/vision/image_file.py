"""Opening images: from what a user gives to RGB pixels, and a key that tells contents apart.

Knows nothing of models. What is opened is untrusted: sizes are checked before anything is decoded,
and no format is read for which Pillow runs other programs. Pillow itself is imported with the first
image.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sf_local.errors import ImageError

if TYPE_CHECKING:
    import PIL.Image

ImageInput: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | PIL.Image.Image | GivenImage"
)

MAX_PIXELS = 64_000_000
MAX_ASPECT = 200
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_REMEDY = (
    "Give a path, the bytes of a file, a PIL image or a base64 data URL; of a whole image in one "
    f"of the formats {', '.join(_FORMATS)}, of at most {MAX_PIXELS // 10**6} megapixels and "
    f"{MAX_ASPECT}:1."
)
_MAX_FILE_BYTES = 256 << 20  # 64 megapixels of RGBA
_MAX_URL_BYTES = 64 << 20
_URL_SECONDS = 30

_PILLOW_LOCK = threading.Lock()  # over images of callers, who may share them between threads


class GivenImage:
    """An image as a user gave it: read at the first use, once, and decoded when asked for.

    Args:
        image: a path, the bytes of a file, a PIL image, a base64 data URL, or an http(s) URL.
        allow_urls: fetch http(s) URLs, within 30 s and 64 MiB.

    `key` and `pixels` raise ImageError: it is none of these, cannot be read or decoded, or is too
    large. Different ones may be used from different threads.
    """

    def __init__(self, image: ImageInput, allow_urls: bool = False) -> None:
        self._image, self._allow_urls = image, allow_urls

    @functools.cached_property
    def key(self) -> bytes:
        """16 bytes that only images of the same content share.

        A hash of the file's bytes, or of a PIL image's pixels: the same picture has another key in
        another format.
        """
        digest, content = hashlib.blake2b(digest_size=16), self._content
        if not isinstance(content, bytes):
            digest.update(repr(content.shape).encode())
        digest.update(content if isinstance(content, bytes) else content.data)
        return digest.digest()

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [height, width, 3], RGB, upright, over white where transparent, read-only.

        Of an animated file this is the first frame, with a UserWarning; of a PIL image the one that
        it stands at.
        """
        if not isinstance(self._content, bytes):
            return self._content
        with _refusals(self._image):
            return _decoded(self._content, _shown(self._image))

    @functools.cached_property
    def _content(self) -> bytes | NDArray[np.uint8]:
        """The bytes of a file, or the pixels of a PIL image."""
        with _refusals(self._image):
            return _read(self._image, self._allow_urls)


@contextmanager
def _refusals(image: object) -> Iterator[None]:
    """Whatever goes wrong, as an ImageError that says what was given and what can be."""
    try:
        yield
    except Exception as error:  # anything may come out of Pillow's decoders
        reason = (str(error) or type(error).__name__).rstrip(".")
        raise ImageError(
            f"image={_shown(image)} cannot be used: {reason[:200]}. {_REMEDY}"
        ) from error


def _shown(image: object) -> str:
    if isinstance(image, (str, os.PathLike)):
        text = str(image)
        return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."
    size = f" of {len(image)} bytes" if isinstance(image, (bytes, bytearray)) else ""
    return f"<{type(image).__name__}{size}>"


def _read(image: object, allow_urls: bool) -> bytes | NDArray[np.uint8]:
    from PIL import Image

    if isinstance(image, Image.Image):
        with _PILLOW_LOCK:  # one that was opened lazily is read at its first use
            return _rgb(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, str) and image.startswith("data:"):
        return _decode_data_url(image)
    if isinstance(image, str) and image[:8].lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise ValueError("URLs are fetched only with allow_urls=True")
        return _fetch(image)
    if isinstance(image, (str, os.PathLike)):
        return _read_file(Path(os.path.expanduser(os.fsdecode(image))))
    raise TypeError("it is not an image")


def _decode_data_url(url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError("it is a data URL that does not begin as data:image/png;base64, does")
    return base64.b64decode("".join(payload.split()), validate=True)


def _fetch(url: str) -> bytes:
    """In a thread of its own: a server may answer so slowly that no timeout of a socket passes."""
    answer: Future[bytes] = Future()

    def fetch() -> None:
        try:
            answer.set_result(_download(url))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=fetch, name="sf-local-fetch", daemon=True).start()
    try:
        return answer.result(_URL_SECONDS)
    except FutureTimeout:
        raise TimeoutError(f"it takes more than {_URL_SECONDS} s to fetch") from None


def _download(url: str) -> bytes:
    from urllib import request  # 40 ms

    opener = request.OpenerDirector()  # which follows redirects to nothing but http(s)
    for kind in (
        request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler,
        request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler, request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(kind())
    # some servers refuse urllib's own name
    asked = request.Request(url, headers={"User-Agent": "sf-local"})
    with opener.open(asked, timeout=_URL_SECONDS) as response:
        data: bytes = response.read(_MAX_URL_BYTES + 1)
    if len(data) > _MAX_URL_BYTES:
        raise ValueError(f"it has more than {_MAX_URL_BYTES >> 20} MiB")
    return data


def _read_file(file: Path) -> bytes:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may not end
        raise ValueError("it is not a file")
    if not status.st_size:  # nor that of the kernel's own files
        raise ValueError("it is empty")
    if status.st_size > _MAX_FILE_BYTES:
        raise ValueError(f"it has more than {_MAX_FILE_BYTES >> 20} MiB")
    with file.open("rb") as opened:
        return opened.read(status.st_size)


def _decoded(data: bytes, name: str) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]"""
    image = _identified(data)
    pixels = _rgb(image)
    # the further images of an MPO, a JPEG file, are previews and maps of depth
    if image.format != "MPO" and getattr(image, "is_animated", False):
        warnings.warn(f"image={name}: only its first frame is used", UserWarning, stacklevel=3)
    return pixels


def _identified(data: bytes) -> PIL.Image.Image:
    """Image.open of our formats, without its check of the size.

    That one warns, and warnings cannot be silenced in one thread alone.
    """
    from PIL import Image

    Image.preinit()
    for name in _FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN[name]
        if accept and accept(data[:16]) is True:
            return factory(io.BytesIO(data), "")
    raise ValueError("its format is unknown")


def _rgb(image: PIL.Image.Image) -> NDArray[np.uint8]:
    """uint8 [height, width, 3], upright, over white: what transformers makes of an image."""
    from PIL import Image, ImageOps

    _check(image)
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _check(image: PIL.Image.Image) -> None:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_ASPECT}:1")
    if image.mode.startswith(("I", "F")):  # which Pillow would clip to white
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}); convert it first")
