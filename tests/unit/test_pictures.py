"""Decoding: what a network sees, and what is refused."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, WebPImagePlugin
from torchvision.transforms import functional as reference

from sft.pictures import BadPicture, Preprocessing, decode, decode_own, encode_png, thumbnail

SMALL = Preprocessing(image_size=32)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_declares(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_every_format_becomes_a_square_of_bytes(kind: str) -> None:
    """Every format that a feed may hold decodes to uint8 (C, H, W) with the original size kept."""
    picture = decode(encoded(noise(50, 40), kind), SMALL)
    assert picture.pixels.shape == (3, 32, 32)
    assert picture.pixels.dtype == torch.uint8
    assert (picture.width, picture.height) == (50, 40)
    assert picture.mode == ("P" if kind == "GIF" else "RGB")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_every_truncation_is_refused_or_harmless(kind: str) -> None:
    """Whatever the place of the cut, decode raises BadPicture with a reason and nothing else."""
    whole = encoded(noise(20, 16), kind)
    for length in range(0, len(whole) - 30, 7):
        with pytest.raises(BadPicture) as caught:
            decode(whole[:length], SMALL)
        assert caught.value.reason
    with pytest.raises(BadPicture, match=r"^truncated$"):
        decode(whole[: len(whole) * 2 // 3], SMALL)


def test_flipped_bytes_never_raise_anything_else() -> None:
    """Damaged pictures decode or raise BadPicture, whichever byte was hit."""
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM"):
        whole = np.frombuffer(encoded(noise(20, 16), kind), dtype=np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[rng.integers(0, min(len(broken), 200), 3)] = rng.integers(0, 256, 3)
            with suppress(BadPicture):
                assert decode(broken.tobytes(), SMALL).pixels.shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am a text", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "not a picture"),
        (bytes(100), "not a picture"),
    ],
)
def test_what_is_no_picture_is_refused(content: bytes, reason: str) -> None:
    """Other files are refused by their first bytes; no format that starts a program is known."""
    with pytest.raises(BadPicture) as caught:
        decode(content, SMALL)
    assert caught.value.reason == reason


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    """A small PNG that declares 40000x40000 is refused before anything is allocated."""
    bomb = png_that_declares(40000, 40000)
    assert len(bomb) < 200
    with pytest.raises(
        BadPicture, match=r"^decompression bomb: 40000x40000 > max_pixels=50000000$"
    ):
        decode(bomb, SMALL)
    with pytest.raises(BadPicture, match=r"decompression bomb: 50x40 > max_pixels=1999"):
        decode(encoded(noise(50, 40)), SMALL, max_pixels=1999)
    decode(encoded(noise(50, 40)), SMALL, max_pixels=2000)


def chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content


def with_size(kind: str, width: int, height: int) -> bytes:
    """Write another size into the header of a small picture."""
    lossless = kind == "VP8L"
    form = "WEBP" if kind.startswith("VP8") else kind
    whole = bytearray(encoded(noise(8, 8), form, **({"lossless": True} if lossless else {})))
    if kind == "JPEG":
        place = whole.index(b"\xff\xc0") + 5
        whole[place : place + 4] = struct.pack(">HH", height, width)
    elif kind == "GIF":
        whole[6:10] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        whole[18:26] = struct.pack("<ii", width, height)
    elif kind == "PPM":
        return b"P6 %d %d 255\n" % (width, height) + bytes(100)
    elif kind == "TIFF":
        first = int.from_bytes(whole[4:8], "little") + 2
        for place in range(
            first, first + 12 * int.from_bytes(whole[first - 2 : first], "little"), 12
        ):
            if (tag := int.from_bytes(whole[place : place + 2], "little")) in (256, 257):
                value = width if tag == 256 else height
                whole[place + 2 : place + 12] = struct.pack("<HII", 4, 1, value)
    elif kind == "VP8 ":
        whole[26:30] = struct.pack("<HH", width, height)
    elif lossless:
        whole[21:25] = struct.pack("<I", width - 1 | height - 1 << 14)
    else:  # one small frame on a large canvas
        canvas = (width - 1 | height - 1 << 24).to_bytes(6, "little")
        frame = bytes(6) + b"\7\0\0\7\0\0" + bytes(4) + whole[12:]
        parts = chunk(b"VP8X", b"\2\0\0\0" + canvas) + chunk(b"ANIM", bytes(6))
        return chunk(b"RIFF", b"WEBP" + parts + chunk(b"ANMF", frame))
    return bytes(whole)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "PPM", "TIFF", "VP8 ", "VP8L", "VP8X"])
def test_a_picture_that_declares_too_much_is_refused_before_there_is_room_for_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few hundred bytes that declare 144 megapixels take no memory, in any format.

    libwebp makes room for the canvas as soon as it is opened, so its reader is never reached.
    """
    small = with_size(kind, 8, 8)
    if kind != "PPM":
        assert decode(small, SMALL).width == 8
    bomb = with_size(kind, 12_000, 12_000)
    assert len(bomb) < 1000
    if kind.startswith("VP8"):
        monkeypatch.delattr(WebPImagePlugin._webp, "WebPAnimDecoder")
    with pytest.raises(BadPicture, match=r"^decompression bomb: 12000x12000 > max_pixels=5000"):
        decode(bomb, SMALL)


def test_a_very_long_picture_stays_small() -> None:
    """Resizing by the shorter side does not blow a 1 x 200000 picture up."""
    picture = decode(encoded(Image.new("RGB", (200_000, 1), (9, 8, 7))), Preprocessing(224))
    assert picture.pixels.shape == (3, 224, 224)
    assert picture.pixels[:, 0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (33, 97), (28, 28), (300, 200)])
def test_resize_and_crop_agree_with_torchvision(size: tuple[int, int]) -> None:
    """The pixels are those of torchvision's Resize and CenterCrop, to one rounding step."""
    image = noise(*size)
    expected = reference.center_crop(reference.resize(image, [40]), [32])
    picture = decode(encoded(image), Preprocessing(image_size=32, resize_size=40))
    difference = picture.pixels.int() - reference.pil_to_tensor(expected).int()
    assert difference.abs().max() <= 1


def test_a_big_jpeg_by_draft_is_close_to_the_full_decoding() -> None:
    """Decoding at a smaller scale changes a smooth picture by a few grey levels at most."""
    small = noise(12, 9).resize((1200, 900), Image.Resampling.BICUBIC)
    full = reference.center_crop(reference.resize(small, [64]), [64])
    picture = decode(encoded(small, "JPEG", quality=95), Preprocessing(64))
    assert (picture.width, picture.height) == (1200, 900)
    difference = picture.pixels.float() - reference.pil_to_tensor(full).float()
    assert difference.abs().mean() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    """Pictures stand upright for every EXIF orientation, and so do their sizes."""
    image = Image.new("RGB", (64, 32))
    image.paste((250, 0, 0), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(image, kind, exif=exif)
    with Image.open(io.BytesIO(stored)) as opened:
        upright = ImageOps.exif_transpose(opened)
        expected = reference.pil_to_tensor(upright.convert("RGB").resize((32, 32)))
        size = upright.size
    picture = decode(stored, SMALL)
    assert (picture.width, picture.height) == size
    # the crop differs from the squeezed reference, its corner's colour does not
    assert (picture.pixels[0, 0, 0] > 128) == (expected[0, 0, 0] > 128)
    assert (picture.pixels[0, -1, -1] > 128) == (expected[0, -1, -1] > 128)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_channels_asked_for(mode: str, channels: int) -> None:
    """Palettes, alpha, CMYK and 16 bits end as 1 or 3 channels, and grey stays grey."""
    if mode == "I;16":
        image = Image.fromarray(np.full((32, 32), 128 * 257, dtype=np.uint16))
    else:
        image = Image.new("L", (32, 32), 128).convert("RGB").convert(mode)
    stored = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    picture = decode(stored, Preprocessing(32, 32, channels))
    assert picture.pixels.shape == (channels, 32, 32)
    if mode not in ("1", "P"):
        assert (picture.pixels.int() - 128).abs().max() <= 1


def test_floating_point_pixels_are_refused() -> None:
    """Nobody knows which value of a float picture is white, so it is not guessed."""
    stored = encoded(Image.new("F", (32, 32), 0.5), "TIFF")
    with pytest.raises(BadPicture, match="floating-point"):
        decode(stored, SMALL)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels: int) -> None:
    """encode_png and decode are inverse, and equal pixels give equal bytes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (channels, 32, 32), generator=generator, dtype=torch.uint8)
    stored = encode_png(pixels)
    assert torch.equal(decode(stored, Preprocessing(32, 32, channels)).pixels, pixels)
    assert torch.equal(decode_own(stored, Preprocessing(32, 32, channels)), pixels)
    assert encode_png(pixels.clone()) == stored


def test_what_is_not_our_own_is_decoded_as_strangers_are() -> None:
    """A picture of another size is resized, one of another mode turned, a damaged one named."""
    small = encoded(noise(16, 16))
    seen = Preprocessing(32, 32, 1)
    assert torch.equal(decode_own(small, seen), decode(small, seen).pixels)
    with pytest.raises(BadPicture, match="truncated"):
        decode_own(small[:100], Preprocessing(16, 16))


def test_encode_png_names_a_wrong_shape() -> None:
    """Floats and other channel counts are refused with what was given."""
    with pytest.raises(ValueError, match=r"torch.float32 \(3, 4, 4\)"):
        encode_png(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        encode_png(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_preprocessing_checks_its_values() -> None:
    """The resize size defaults to the image size, and impossible sizes are named."""
    assert Preprocessing(image_size=28, channels=1) == Preprocessing(28, 28, 1)
    with pytest.raises(ValueError, match="resize_size=20 is smaller than image_size=28"):
        Preprocessing(28, 20)
    with pytest.raises(ValueError, match="channels is 4"):
        Preprocessing(28, 28, 4)
    with pytest.raises(ValueError, match="image_size is 0"):
        Preprocessing(0)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 224, 224), (3, 1, 500)])
def test_thumbnails_are_small_jpegs(shape: tuple[int, int, int]) -> None:
    """The longer side is 96 pixels, whatever the size; the brightness stays."""
    pixels = torch.full(shape, 200, dtype=torch.uint8)
    shown = Image.open(io.BytesIO(thumbnail(pixels)))
    assert (shown.format, max(shown.size)) == ("JPEG", 96)
    assert abs(np.asarray(shown).mean() - 200) < 3
