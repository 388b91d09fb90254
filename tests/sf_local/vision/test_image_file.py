"""Opening images: every way to give one, what is refused, and keys. The oracle is transformers."""

from __future__ import annotations

import base64
import io
import itertools
import os
import socketserver
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers.image_transforms import convert_to_rgb

from sf_local.errors import ImageError, RequestError
from sf_local.vision.image_file import GivenImage

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
ORIENTATION = 0x0112


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> PIL.Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [(x * 6 + 3 * n + y * (n + 1)) % 256 for n in range(4)]
    image = PIL.Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))  # RGBA
    return image.convert("RGB").convert(mode) if mode != "RGBA" else image


def encoded(image: PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size without its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT"
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
              for c in (header, data)]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def refused(image: Any, message: str, **options: Any) -> str:
    with pytest.raises(ImageError, match=message) as caught:
        GivenImage(image, **options).pixels()
    text = str(caught.value)
    assert isinstance(caught.value, RequestError)
    assert text.startswith("image=") and "Give a path" in text and len(text) < 700
    return text


def test_every_way_to_give_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file, data = tmp_path / "a.png", encoded(picture())
    file.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    given: list[Any] = [file, str(file), "~/a.png", data, bytearray(data), memoryview(data), url]
    for image in given:
        key, pixels = GivenImage(image).key, GivenImage(image).pixels()
        assert np.array_equal(pixels, np.asarray(picture()))
        assert pixels.dtype == np.uint8 and not pixels.flags.writeable
        assert key == GivenImage(file).key and len(key) == 16
    assert np.array_equal(GivenImage(picture()).pixels(), np.asarray(picture()))


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format: str) -> None:
    data = encoded(picture(), format)
    expected = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(GivenImage(data).pixels(), np.asarray(expected))
    with pytest.raises(ImageError, match="cannot be used"):  # whatever the decoder says
        GivenImage(data[: len(data) // 2]).pixels()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_are_converted_as_transformers_does(mode: str) -> None:
    image = picture(mode="RGBA" if mode in ("LA", "PA", "RGBA") else mode)
    image = image.convert(mode) if image.mode != mode else image
    assert np.array_equal(GivenImage(image).pixels(), convert_to_rgb(image, return_numpy=True))


def test_a_transparent_color_is_white() -> None:
    image = PIL.Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=0)
    assert GivenImage(data).pixels().tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    stored = picture()
    data = encoded(stored, exif=exif)
    turned = [
        None,
        PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        PIL.Image.Transpose.ROTATE_180,
        PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        PIL.Image.Transpose.TRANSPOSE,
        PIL.Image.Transpose.ROTATE_270,
        PIL.Image.Transpose.TRANSVERSE,
        PIL.Image.Transpose.ROTATE_90,
    ][orientation - 1]
    upright = stored if turned is None else stored.transpose(turned)
    for image in (data, PIL.Image.open(io.BytesIO(data))):
        assert np.array_equal(GivenImage(image).pixels(), np.asarray(upright))


def test_a_file_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(picture()))
    given = GivenImage(file)
    assert given.key == GivenImage(file.read_bytes()).key
    file.write_bytes(b"no image")
    assert np.array_equal(given.pixels(), np.asarray(picture()))
    refused(file, "its format is unknown")


def test_keys() -> None:
    palette = PIL.Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    recolored = palette.copy()
    recolored.putpalette([0, 0, 0, 8, 8, 8])
    turned = picture(4, 4)
    turned.getexif()[ORIENTATION] = 3
    images: list[Any] = [
        palette, recolored, turned, picture(4, 4), picture(2, 8), picture(8, 2), picture(),
        encoded(picture()), encoded(picture(), "BMP"),
    ]  # fmt: skip
    assert len({GivenImage(image).key for image in images}) == len(images)
    assert GivenImage(picture()).key == GivenImage(picture().copy()).key
    assert GivenImage(b"not decoded").key  # the content alone counts


def test_the_image_of_the_caller_is_left_alone() -> None:
    for mode in ("RGB", "P"):
        image = picture(mode=mode)
        image.getexif()[ORIENTATION] = 6
        before = (image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif()))
        pixels = GivenImage(image).pixels()
        assert pixels.shape == (40, 30, 3)
        assert before == (
            image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif())
        )  # fmt: skip


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first(format: str) -> None:
    frames = [picture(), PIL.Image.new("RGB", (40, 30), "red")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"^image=<bytes of \d+ bytes>: only its first"):
        pixels = GivenImage(data).pixels()
    first = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(pixels, np.asarray(first))


@pytest.mark.filterwarnings("error")
def test_previews_of_a_jpeg_are_no_frames() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(20, 15)])
    assert GivenImage(data).pixels().shape == (30, 40, 3)


@pytest.mark.parametrize("image", [None, 3, ["a.png"], object(), np.zeros((2, 2, 3))])
def test_what_is_no_image(image: Any) -> None:
    text = refused(image, "it is not an image")
    assert f"image=<{type(image).__name__}>" in text


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # whose own path may be too long to be shown
    refused("no.png", r"image='no\.png' .*No such file")
    refused("file:///no.png", "No such file")
    refused("", "it is not a file")
    refused("/proc/self/status", "it is empty")
    refused("a\0b", "null")
    refused("x" * 100_000, "image='x+'[.]{3} .*too long")
    refused(tmp_path, "it is not a file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "it is not a file")
    refused("/dev/zero", "it is not a file")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate((256 << 20) + 1)
    refused(tmp_path / "huge.png", "more than 256 MiB")


def test_files_that_are_no_images(tmp_path: Path) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    contents = [b"", b"some text", postscript, b"%PDF-1.4", encoded(picture(16, 16), "ICO")]
    for content in contents:
        file = tmp_path / "a.png"
        file.write_bytes(content)
        refused(file, "its format is unknown" if content else "it is empty")
        refused(content, f"image=<bytes of {len(content)} bytes> ")


def test_truncated_anywhere() -> None:
    for format in ("PNG", "JPEG"):
        data = encoded(picture(), format)
        for length in range(0, len(data) - 20, 97):
            refused(data[:length], "cannot be used")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [8001, 10_000, 12_000, 30_000, 2**31 - 1])
def test_too_many_pixels(side: int) -> None:
    refused(png_header(side, side), f"it has {side} x {side} pixels.*at most 64 megapixels")


def test_too_many_pixels_before_they_are_decoded() -> None:
    image = PIL.Image.open(io.BytesIO(png_header(8001, 8001)))
    refused(image, "it has 8001 x 8001 pixels")


def test_shapes() -> None:
    refused(picture(1, 5000), "it has 1 x 5000 pixels, more than 200:1")
    refused(encoded(picture(201, 1)), "it has 201 x 1 pixels, more than 200:1")
    refused(PIL.Image.new("RGB", (0, 5)), "it has 0 x 5 pixels")
    assert GivenImage(picture(1, 200)).pixels().shape == (200, 1, 3)
    assert GivenImage(picture(1, 1)).pixels().shape == (1, 1, 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits(dtype: type) -> None:
    refused(PIL.Image.fromarray(np.ones((4, 4), dtype)), "more than 8 bits a channel")


def test_a_closed_image() -> None:
    image = PIL.Image.open(io.BytesIO(encoded(picture())))
    image.close()
    refused(image, "closed image")


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,!!!",
        "data:image/png;base64,QUJD",
        "data:image/png,abc",
        "data:",
        "data:,é",
    ],
)
def test_data_urls_that_hold_no_image(url: str) -> None:
    refused(url, "cannot be used")
    assert len(refused(url + "A" * 100_000, "cannot be used")) < 700


class Web(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response({"/a.png": 200, "/slow": 200, "/ftp": 302}.get(self.path, 404))
        if self.path == "/ftp":
            self.send_header("Location", "ftp://127.0.0.1/a.png")
        while self.path == "/slow" and self.server.is_open:  # type: ignore[attr-defined]
            self.send_header("Wait", "for more")
            self.flush_headers()
            time.sleep(0.02)
        self.end_headers()
        self.wfile.write(encoded(picture()))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socketserver.TCPServer(("127.0.0.1", 0), Web) as server:
        server.is_open = True  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.is_open = False  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


def test_urls(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{web}/a.png"
    refused(url, r"only Engine\(allow_urls=True\), in Python")
    refused("HTTPS://example.com/a.png", r"only Engine\(allow_urls=True\), in Python")
    assert np.array_equal(GivenImage(url, allow_urls=True).pixels(), np.asarray(picture()))
    assert GivenImage(url, allow_urls=True).key == GivenImage(encoded(picture())).key
    refused(f"{web}/none", "404", allow_urls=True)
    refused("http://", "no host", allow_urls=True)
    refused("http://127.0.0.1:9/", "refused", allow_urls=True)
    refused(f"{web}/ftp", "unknown url type: ftp", allow_urls=True)
    monkeypatch.setattr("sf_local.vision.image_file._MAX_URL_BYTES", 100)
    refused(url, "more than 0 MiB", allow_urls=True)
    monkeypatch.setattr("sf_local.vision.image_file._URL_SECONDS", 0.5)
    refused(f"{web}/slow", r"more than 0\.5 s", allow_urls=True)


def test_a_slow_url_holds_up_no_other_image(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sf_local.vision.image_file._fetch", lambda *_: fetched.get(timeout=60))
    fetched: SimpleQueue[bytes] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(lambda: GivenImage(f"{web}/slow", allow_urls=True).key)
        other = GivenImage(encoded(picture())).key
        assert not slow.done()
        fetched.put(encoded(picture()))
        assert slow.result() == other


def with_scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan, an empty one of a few bytes, is there `count` times."""
    data = encoded(picture(side, side), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


def test_jpegs_of_many_scans() -> None:
    usual = encoded(picture(64, 64), "JPEG", progressive=True)
    assert usual.count(b"\xff\xda") > 5
    assert GivenImage(usual).pixels().shape == (64, 64, 3)
    refused(with_scans(9000, 64), r"it has 90\d\d scans of 0.0 megapixels")


def test_scans_behind_a_marker_without_a_length() -> None:
    """Two bytes that are no length would hide what follows."""
    data = with_scans(9000, 64)
    start = data.rindex(b"\xff\xda", 0, len(data) // 2)
    refused(data[:start] + b"\xff\x01\xfe\xfe" + data[start:], "scans of 0.0 megapixels")


def test_what_only_looks_like_scans() -> None:
    """In a comment, and in the film that phones put behind a picture."""
    data, scans = encoded(picture(64, 64), "JPEG"), b"\xff\xda" * 1000
    comment = b"\xff\xfe" + (2 + len(scans)).to_bytes(2, "big") + scans
    found = GivenImage(data[:2] + comment + data[2:] + scans).pixels()
    assert np.array_equal(found, GivenImage(data).pixels())


def many_parts(image_format: str) -> bytes:
    """A PNG of many empty chunks, a TIFF of many images, a PPM of many lines: Pillow reads each."""
    data = encoded(picture(64, 64), image_format)
    if image_format == "PNG":
        return (
            data[:33]
            + (bytes(4) + b"teXt" + zlib.crc32(b"teXt").to_bytes(4, "big")) * 50
            + data[33:]
        )
    if image_format == "TIFF":
        return encoded(picture(8, 8), "TIFF", save_all=True, append_images=[picture(8, 8)] * 50)
    return b"P3 64 4000 255 " + b"0 " * (3 * 64 * 4000)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_decoding_has_a_limit_of_time(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, clock = many_parts(image_format), itertools.count(step=0.001)
    with warnings.catch_warnings(action="ignore"):
        assert GivenImage(data).pixels().size
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    assert GivenImage(encoded(picture(64, 64))).pixels().size
    clock = itertools.count()
    refused(data, "it takes more than 10 s to decode")
    assert next(clock) <= 13


def test_a_url_is_fetched_until_a_deadline(web: str) -> None:
    image = GivenImage(f"{web}/slow", allow_urls=True)
    with pytest.raises(ImageError, match="more than 0 s to fetch"):
        image.read(time.perf_counter() - 1)


class SlowFile(io.BytesIO):
    """A file whose reader waits for `ready` once `is_slow`."""

    is_slow = False

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.ready = threading.Event()

    def read(self, *size: Any) -> bytes:
        assert not self.is_slow or self.ready.wait(60)
        return super().read(*size)


def test_a_slow_pil_image_holds_up_no_other() -> None:
    file = SlowFile(encoded(picture()))
    lazy, file.is_slow = PIL.Image.open(file), True
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(lambda: GivenImage(lazy).key)
        other = GivenImage(picture()).key
        assert not slow.done()
        file.ready.set()
        assert slow.result() == other


def test_jpegs_of_many_scans_of_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sf_local.vision.image_file.MAX_SCANNED", 64 * 64 * 8)
    assert GivenImage(encoded(picture(64, 64), "JPEG")).pixels().shape == (64, 64, 3)
    refused(encoded(picture(64, 64), "JPEG", progressive=True), "scans of 0.0 megapixels")


def test_threads() -> None:
    """Of files, and of one image that all of them read lazily."""
    data = encoded(picture(1500, 1500), compress_level=0)
    expected = GivenImage(data).pixels()
    for _ in range(5):
        shared = PIL.Image.open(io.BytesIO(data))
        with ThreadPoolExecutor(8) as pool:
            for opened in pool.map(lambda i: GivenImage(i).pixels(), [shared] * 8 + [data]):
                assert np.array_equal(opened, expected)


def test_pillow_is_imported_with_the_first_image() -> None:
    program = """
import sys, sf_local.vision.image_file, sf_local.vision.processor
print({"PIL", "transformers", "torch", "urllib.request"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "set()", done.stderr
