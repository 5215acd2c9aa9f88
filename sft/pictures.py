"""Encoded pictures to uint8 tensors and back; the only place of the package that decodes."""

import io
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

MAX_PIXELS = 50_000_000
COMPRESSION = 3
"""Of PNG. A photograph of 224 pixels takes 5.5 CPU ms and 57 kB; at Pillow's own 6, 14.9 and 55."""

# The formats are named one by one, and opened without Image.open: what a batch brings is not to be
# trusted, and Pillow also knows formats that start other programs (EPS runs Ghostscript). Moreover
# Image.open checks the size against a limit that is global to the process.
_READERS: tuple[tuple[bytes, Callable[[io.BytesIO], ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF87a", GifImagePlugin.GifImageFile),
    (b"GIF89a", GifImagePlugin.GifImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    *((prefix, TiffImagePlugin.TiffImageFile) for prefix in TiffImagePlugin.PREFIXES),
    *((b"P%d" % kind, PpmImagePlugin.PpmImageFile) for kind in range(1, 7)),
)
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # orientations that swap width and height


class BadPicture(ValueError):  # noqa: N818 -- a fact about a picture; most callers handle it
    """Bytes that cannot be used as a picture; `reason` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Preprocessing:
    """What a network wants to see, in pixels.

    The shorter side is resized to `resize_size` (0, the default, stands for `image_size`), then the
    central `image_size` x `image_size` square is cut out. `channels` is 1 (grey) or 3 (RGB).

    Raises:
        ValueError: a size is not positive, the crop is larger than the resized picture, or
            `channels` is neither 1 nor 3.
    """

    image_size: int
    resize_size: int = 0
    channels: int = 3

    def __post_init__(self) -> None:
        if self.resize_size == 0:
            object.__setattr__(self, "resize_size", self.image_size)
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be at least 1")
        if self.resize_size < self.image_size:
            raise ValueError(
                f"resize_size={self.resize_size} is smaller than image_size={self.image_size}, "
                "so there would be nothing to crop from"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; it must be 1 (grey) or 3 (RGB)")


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Picture:
    """A decoded picture.

    `pixels` is uint8 (C, H, W). `width` and `height` are those of the encoded picture as a viewer
    shows it (after its EXIF orientation), before resizing; `mode` is its Pillow mode.
    """

    pixels: Tensor
    width: int
    height: int
    mode: str


def decode(
    encoded: bytes, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS
) -> Picture:
    """Decode, turn upright, resize the shorter side and crop the centre.

    Resizing and cropping agree with torchvision's `Resize` (bilinear, antialiased) and `CenterCrop`
    on the same PIL image. Of an animation or a multi-page TIFF the first frame counts; alpha is
    dropped; 16-bit grey is scaled to 8 bits. Large JPEGs are decoded at a smaller scale (`draft`),
    never below twice `resize_size`, the gap that Pillow's own `thumbnail` leaves for quality.

    Raises:
        BadPicture: "empty", "not a picture", "truncated", "decompression bomb: WxH > max_pixels=N"
            (judged by the header, before anything of that size is allocated) or "broken: ...".
    """
    if not encoded:
        raise BadPicture("empty")
    reader = _find_reader(encoded, max_pixels)
    stream = _Stream(encoded)
    # Pillow raises nearly everything on broken input; only a lack of memory is not the picture's
    try:
        image = reader(stream)
    except MemoryError:
        raise
    except Exception as error:
        raise BadPicture("truncated" if stream.ended_early else _reason(error)) from error
    try:
        with image:
            return _decode(image, preprocessing, max_pixels)
    except (BadPicture, MemoryError):
        raise
    except Exception as error:
        raise BadPicture(_reason(error)) from error


def encode_png(pixels: Tensor) -> bytes:
    """Encode uint8 (C, H, W) with 1 or 3 channels as PNG, without loss.

    Raises:
        ValueError: another dtype or shape.
    """
    if pixels.dtype != torch.uint8 or pixels.shape[0:-2] not in ((1,), (3,)):
        raise ValueError(
            f"expected uint8 pixels (1 or 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}"
        )
    buffer = io.BytesIO()
    _to_image(pixels).save(buffer, format="PNG", compress_level=COMPRESSION)
    return buffer.getvalue()


def decode_own(encoded: bytes, preprocessing: Preprocessing) -> Tensor:
    """Decode what `encode_png` wrote, uint8 (C, H, W), without what strangers' pictures need.

    Raises:
        BadPicture: as `decode`.
    """
    size, mode = preprocessing.image_size, "L" if preprocessing.channels == 1 else "RGB"
    with suppress(Exception), PngImagePlugin.PngImageFile(io.BytesIO(encoded)) as image:
        if (image.mode, image.size) == (mode, (size, size)):
            array = np.array(image).reshape(size, size, preprocessing.channels)
            return torch.from_numpy(array).permute(2, 0, 1).contiguous()
    return decode(encoded, preprocessing).pixels  # damaged: it says in which way


def thumbnail(pixels: Tensor, size: int = 96) -> bytes:
    """Encode uint8 (C, H, W) as a small JPEG for people; smaller pictures are enlarged.

    Args:
        pixels: with 1 or 3 channels.
        size: of its longer side, in pixels.
    """
    image = _to_image(pixels)
    scale = size / max(image.size)
    shape = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    buffer = io.BytesIO()
    image.resize(shape, method).save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def _to_image(pixels: Tensor) -> Image.Image:
    array = pixels.permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


class _Stream(io.BytesIO):
    """Notes whether somebody asked for bytes behind the end, which a whole header never needs."""

    ended_early = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.ended_early |= size is not None and len(data) < size
        return data


def _find_reader(encoded: bytes, max_pixels: int) -> Callable[[io.BytesIO], ImageFile.ImageFile]:
    for prefix, reader in _READERS:
        if encoded.startswith(prefix):
            if prefix == b"RIFF":
                _check_webp(encoded, max_pixels)
            return reader
    raise BadPicture("not a picture")


def _check_webp(encoded: bytes, max_pixels: int) -> None:
    riff, webp = 8, 12  # bytes: the RIFF header with the length of the rest, and the form's name
    if not b"WEBP".startswith(encoded[riff:webp]):
        raise BadPicture("not a picture")  # a sound or a film
    # libwebp calls a short file broken, so the length is compared here
    if len(encoded) < max(webp, riff + int.from_bytes(encoded[4:riff], "little")):
        raise BadPicture("truncated")
    _refuse_bomb(*_webp_size(encoded), max_pixels)  # its reader makes room before it tells the size


def _webp_size(encoded: bytes) -> tuple[int, int]:
    """Read width and height from the first chunk: lossy, lossless, or of several."""
    kind, low = encoded[12:16], 0x3FFF  # 14 bits
    if kind == b"VP8X":
        bits = int.from_bytes(encoded[24:30], "little")
        return 1 + (bits & 0xFFFFFF), 1 + (bits >> 24)
    if kind == b"VP8L":
        bits = int.from_bytes(encoded[21:25], "little")
        return 1 + (bits & low), 1 + (bits >> 14 & low)
    bits = int.from_bytes(encoded[26:30], "little")
    return bits & low, bits >> 16 & low


def _refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadPicture(f"decompression bomb: {width}x{height} > max_pixels={max_pixels}")


def _decode(image: ImageFile.ImageFile, preprocessing: Preprocessing, max_pixels: int) -> Picture:
    width, height = image.size
    mode = image.mode
    _refuse_bomb(width, height, max_pixels)
    target = "L" if preprocessing.channels == 1 else "RGB"
    gap = 2 * preprocessing.resize_size
    image.draft(target, (gap, gap))
    image.load()
    orientation = _orientation(image)
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # load() has turned it already
        width, height = image.size
    if orientation in _LYING:
        width, height = height, width
    square = _resize_and_crop(_to_mode(image, target), preprocessing)
    if orientation in _ORIENTATIONS:
        square = square.transpose(_ORIENTATIONS[orientation])
    size = preprocessing.image_size
    array = np.array(square).reshape(size, size, preprocessing.channels)
    pixels = torch.from_numpy(array).permute(2, 0, 1).contiguous()
    return Picture(pixels=pixels, width=width, height=height, mode=mode)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 -- damaged EXIF says nothing about the pixels
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_mode(image: Image.Image, target: str) -> Image.Image:
    if image.mode == target:
        return image
    if image.mode == "F":
        raise BadPicture("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert(target)
    if image.mode == "P" and "transparency" in image.info:  # straight to RGB warns, same colours
        image = image.convert("RGBA")
    return image.convert(target)


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    # One resize of the part that is kept: the whole of a very long picture, resized by its shorter
    # side, would be a bomb of our own making.
    width, height = image.size
    short = min(width, height)
    resized_width = int(preprocessing.resize_size * width / short)
    resized_height = int(preprocessing.resize_size * height / short)
    size = preprocessing.image_size
    left = round((resized_width - size) / 2)
    top = round((resized_height - size) / 2)
    across, down = width / resized_width, height / resized_height
    box = (
        left * across,
        top * down,
        min((left + size) * across, width),
        min((top + size) * down, height),
    )
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError | struct.error | IndexError) or "truncat" in str(error).lower():
        return "truncated"
    return f"broken: {str(error) or type(error).__name__}"
