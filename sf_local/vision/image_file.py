"""GivenImage: opens what a user gives as an image, and hashes its content.

Images are untrusted: their size is checked before they are decoded, and no format is read for which
Pillow runs other programs. Pillow itself is imported with the first image.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from sf_local.errors import ImageError

if TYPE_CHECKING:
    import PIL.Image

ImageInput: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | PIL.Image.Image | GivenImage"
)

MAX_PIXELS = 64_000_000
MAX_ASPECT = 200  # the longer side, divided by the shorter one
MAX_SCANS = 100  # passes over a progressive JPEG, each over all of its pixels
MAX_SCANNED = 20 * MAX_PIXELS  # pixels of all passes together
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_REMEDY = (
    "Give a path, the bytes of a file, a PIL image or a base64 data URL; of a whole image in one "
    f"of the formats {', '.join(_FORMATS)}, of at most {MAX_PIXELS // 10**6} megapixels and "
    f"{MAX_ASPECT}:1."
)
_MAX_FILE_BYTES = 256 << 20  # 64 megapixels of RGBA
_MAX_URL_BYTES = 64 << 20
_URL_SECONDS = 30
_DECODE_SECONDS = 10  # of CPU time; 64 megapixels take a third of it
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")  # of a JPEG's segments, with a length
_SCAN, _END = 0xDA, 0xD9

# By id, of PIL images in use, which callers may use in several threads.
_pil_locks: WeakValueDictionary[int, threading.Lock] = WeakValueDictionary()
_pil_locks_lock = threading.Lock()


def _renew_locks() -> None:
    """In a forked child: the threads that held the locks do not exist there."""
    global _pil_locks, _pil_locks_lock
    _pil_locks, _pil_locks_lock = WeakValueDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


class GivenImage:
    """An image as a user gave it: read once, at its first use, and decoded by each `pixels`.

    Args:
        image: a path, the bytes of a file, a PIL image, a base64 data URL, or an http(s) URL.
        allow_urls: fetch http(s) URLs, within 30 s and up to 64 MiB.

    `key` and `pixels` raise ImageError for anything else, for what cannot be read or decoded, and
    for images that are too large. One object must not be used by several threads at a time.
    """

    def __init__(self, image: ImageInput, allow_urls: bool = False) -> None:
        self._image, self._allow_urls = image, allow_urls
        # Not a cached_property: in Python 3.11 it has one lock for all objects, so that a slow URL
        # would hold up every image of the process.
        self._key = b""
        self._read_content: bytes | NDArray[np.uint8] | None = None

    @property
    def key(self) -> bytes:
        """16 bytes that only images of the same content share.

        A hash of the file's bytes, or of a PIL image's pixels, so the same picture has different
        keys in different formats.
        """
        self._key = self._key or self._hash()
        return self._key

    def _hash(self) -> bytes:
        digest, content = hashlib.blake2b(digest_size=16), self._content
        if not isinstance(content, bytes):
            digest.update(repr(content.shape).encode())
        digest.update(content if isinstance(content, bytes) else content.data)
        return digest.digest()

    def pixels(self) -> NDArray[np.uint8]:
        """RGB pixels, uint8 [height, width, 3], read-only.

        Rotated as EXIF says, over white where the image is transparent. Of an animated file, the
        first frame, with a UserWarning; of a PIL image, its current frame.
        """
        if not isinstance(self._content, bytes):
            return self._content
        with _refusals(self._image):
            return _decoded(self._content, _shown(self._image))

    @property
    def _content(self) -> bytes | NDArray[np.uint8]:
        """The bytes of a file, or the pixels of a PIL image."""
        return self.read()

    def read(self, deadline: float | None = None) -> bytes | NDArray[np.uint8]:
        """The bytes of a file, or the pixels of a PIL image; a URL is fetched until the deadline, a
        `time.perf_counter()`. Raises ImageError."""
        if self._read_content is None:
            with _refusals(self._image):
                self._read_content = _read(self._image, self._allow_urls, deadline)
        return self._read_content


class _TimedFile(io.BytesIO):
    """The bytes of a file, for one thread; reading raises ValueError after _DECODE_SECONDS.

    Few bytes can be much work, of which decoders do a part after each read. They go on after an
    OSError, such as TimeoutError.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._end = time.thread_time() + _DECODE_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        """As for any file."""
        if time.thread_time() > self._end:
            raise ValueError(f"it takes more than {_DECODE_SECONDS} s to decode")
        return super().read(size)


@contextmanager
def _refusals(image: object) -> Iterator[None]:
    """Turn any exception into an ImageError that says what was given and what is allowed."""
    try:
        yield
    except Exception as error:  # Pillow's decoders may raise anything
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


def _read(image: object, allow_urls: bool, deadline: float | None) -> bytes | NDArray[np.uint8]:
    from PIL import Image

    if isinstance(image, Image.Image):
        with _pil_locks_lock:
            lock = _pil_locks.setdefault(id(image), threading.Lock())
        with lock:  # Pillow opens files lazily, and reads them here
            return _rgb(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, str) and image.startswith("data:"):
        return _decode_data_url(image)
    if isinstance(image, str) and image[:8].lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise ValueError("only Engine(allow_urls=True), in Python, fetches URLs; give a file")
        left = _URL_SECONDS if deadline is None else deadline - time.perf_counter()
        return _fetch(image, max(0.0, min(left, _URL_SECONDS)))
    if isinstance(image, (str, os.PathLike)):
        return _read_file(Path(os.path.expanduser(os.fsdecode(image))))
    raise TypeError("it is not an image")


def _decode_data_url(url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError("it is a data URL that does not begin as data:image/png;base64, does")
    return base64.b64decode("".join(payload.split()), validate=True)


def _fetch(url: str, seconds: float) -> bytes:
    """Download in another thread, as no timeout of a socket ends a server that sends slowly."""
    answer: Future[bytes] = Future()

    def fetch() -> None:
        try:
            answer.set_result(_download(url))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=fetch, name="sf-local-fetch", daemon=True).start()
    try:
        return answer.result(seconds)
    except FutureTimeout:
        raise TimeoutError(f"it takes more than {seconds:.3g} s to fetch") from None


def _download(url: str) -> bytes:
    from urllib import request  # takes 40 ms

    opener = request.OpenerDirector()  # with handlers for http(s) only, redirects included
    for kind in (
        request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler,
        request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler, request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(kind())
    # Some servers refuse urllib's own name.
    asked = request.Request(url, headers={"User-Agent": "sf-local"})
    with opener.open(asked, timeout=_URL_SECONDS) as response:
        data: bytes = response.read(_MAX_URL_BYTES + 1)
    if len(data) > _MAX_URL_BYTES:
        raise ValueError(f"it has more than {_MAX_URL_BYTES >> 20} MiB")
    return data


def _read_file(file: Path) -> bytes:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
        raise ValueError("it is not a file")
    if not status.st_size:  # nor may reading a file of /proc, whose size is 0
        raise ValueError("it is empty")
    if status.st_size > _MAX_FILE_BYTES:
        raise ValueError(f"it has more than {_MAX_FILE_BYTES >> 20} MiB")
    with file.open("rb") as opened:
        return opened.read(status.st_size)


def _decoded(data: bytes, name: str) -> NDArray[np.uint8]:
    """The pixels of a file's bytes, uint8 [height, width, 3]."""
    image = _identified(data)
    if image.format in ("JPEG", "MPO"):
        _check_scans(data, image.size[0] * image.size[1])
    pixels = _rgb(image)
    # The other images of an MPO file, a kind of JPEG, are previews and depth maps.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        warnings.warn(f"image={name}: only its first frame is used", UserWarning, stacklevel=3)
    return pixels


def _identified(data: bytes) -> PIL.Image.Image:
    """What Image.open does, for our formats only, and without its warning about large images.

    Warnings cannot be silenced for one thread, and `_check` refuses large images anyway.
    """
    from PIL import Image

    Image.preinit()
    for name in _FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN[name]
        if accept and accept(data[:16]) is True:
            return factory(_TimedFile(data), "")
    raise ValueError("its format is unknown")


def _rgb(image: PIL.Image.Image) -> NDArray[np.uint8]:
    """Pixels uint8 [height, width, 3], upright and over white, as transformers converts images."""
    from PIL import Image, ImageOps

    _check(image)
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _check_scans(data: bytes, num_pixels: int) -> None:
    """Raise ValueError for a JPEG that takes minutes to decode."""
    count = _num_scans(data)
    if count > MAX_SCANS or count * num_pixels > MAX_SCANNED:
        raise ValueError(f"it has {count} scans of {num_pixels / 1e6:.1f} megapixels each")


def _num_scans(data: bytes) -> int:
    """The scans of a JPEG's first image; what its segments hold and what follows it, such as a
    preview or a film, may look like scans."""
    count, found = 0, _MARKER.search(data, 2)
    while found and found[1][0] != _END:
        count += found[1][0] == _SCAN
        size = int.from_bytes(data[found.end() : found.end() + 2], "big")
        found = _MARKER.search(data, found.end() + size)
    return count


def _check(image: PIL.Image.Image) -> None:
    """Raise ValueError for an image of a size or a mode that cannot be used."""
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_ASPECT}:1")
    if image.mode.startswith(("I", "F")):  # Pillow would clip these to white
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}); convert it first")
