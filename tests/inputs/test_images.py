"""Opening image files, arrays and masks of every kind, and refusing those that cannot be used."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.images import open_frames, open_image
from unibiomed_jax.inputs.masks import open_mask


def gradient(mode: str = "L") -> Image.Image:
    return Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_eight_bit_modes(tmp_path, mode):
    image = gradient(mode)
    opened, record = open_image(save(tmp_path / "image.png", image))
    assert (opened.mode, record.mode) == ("RGB", mode)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))
    assert bool(record.steps) == (mode != "RGB")


def test_cmyk(tmp_path):
    image = Image.merge("CMYK", [gradient()] * 4)
    opened, record = open_image(save(tmp_path / "image.tif", image))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))
    assert "CMYK" in record.steps[0]


def test_alpha_is_dropped_not_blended(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., :3] = 200
    opened, record = open_image(save(tmp_path / "image.png", Image.fromarray(pixels)))
    assert (np.asarray(opened) == 200).all()
    assert record.steps == ("alpha channel dropped",)


def test_palette_with_transparency(tmp_path):
    image = gradient("P")
    opened, _ = open_image(save(tmp_path / "image.png", image, transparency=bytes(range(256))))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    image = gradient("RGB").resize((30, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened, record = open_image(save(tmp_path / "image.png", image, exif=exif))
    undo = {
        1: np.asarray,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: np.rot90,
    }[orientation]
    np.testing.assert_array_equal(np.asarray(opened), undo(np.asarray(image)))
    assert (record.width, record.height) == opened.size
    assert bool(record.steps) == (orientation > 1)


def test_sixteen_bits_are_scaled_by_their_own_range(tmp_path):
    values = np.array([[1000, 2000], [3000, 4095]], np.uint16)
    opened, record = open_image(save(tmp_path / "image.png", Image.fromarray(values)))
    expected = np.rint((values - 1000) / 3095 * 255)
    np.testing.assert_array_equal(np.asarray(opened), expected[..., None].repeat(3, -1))
    assert record.steps == ("I;16 values 1000..4095 scaled linearly to 0..255",)


def test_sixteen_bits_that_fit_in_eight_are_kept(tmp_path):
    values = np.array([[10, 20], [30, 200]], np.uint16)
    opened, record = open_image(save(tmp_path / "image.tif", Image.fromarray(values)))
    np.testing.assert_array_equal(np.asarray(opened)[..., 0], values)
    assert "were kept" in record.steps[0]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits(tmp_path, dtype):
    values = np.array([[-1000, 0], [500, 1000]], dtype)
    opened, _ = open_image(save(tmp_path / "image.tif", Image.fromarray(values)))
    np.testing.assert_array_equal(np.asarray(opened)[..., 0], [[0, 128], [191, 255]])


def test_frames_share_one_scale():
    frames, records = open_frames([np.full((2, 2), value, np.int16) for value in (-100, 0, 100)])
    assert [np.asarray(frame)[0, 0, 0] for frame in frames] == [0, 128, 255]
    assert len({record.steps for record in records}) == 1


def test_frames_of_different_sizes():
    with pytest.raises(InputError, match="Frame 1 is 5x4 pixels but frame 0 is 4x4"):
        open_frames([np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)])
    with pytest.raises(InputError, match="empty"):
        open_frames([])


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[False, True]]), [[0, 255]]),
        (np.array([[0, 7]], np.int64), [[0, 7]]),
        (np.array([[[3], [4]]], np.uint8), [[3, 4]]),
        (np.array([[0.0, 0.5, 1.0]]), [[0, 128, 255]]),
        (np.full((1, 2), 0.3), [[0, 0]]),
    ],
)
def test_arrays(array, expected):
    opened, record = open_image(array)
    np.testing.assert_array_equal(np.asarray(opened)[..., 0], expected)
    assert record.source == "array"


def test_colour_arrays():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
    opened, record = open_image(pixels)
    np.testing.assert_array_equal(np.asarray(opened), pixels[..., :3])
    assert record.steps == ("alpha channel dropped",)
    deep, _ = open_image(pixels[..., :3].astype(np.uint16) * 257)
    low, high = int(pixels[..., :3].min()), int(pixels[..., :3].max())
    np.testing.assert_array_equal(
        np.asarray(deep), np.rint((pixels[..., :3].astype(float) - low) * 255 / (high - low))
    )


def test_pillow_image_is_not_changed():
    image = gradient("RGB")
    opened, record = open_image(image)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image))
    assert record.source == "Pillow image"


# --- masks ---


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([[0, 1, 1000]], np.uint16),  # label 1 would round to 0 on the way to 8 bits
        ([[700, 700]], np.uint16),
        ([[0, 255]], np.uint8),
        ([[0, 1]], np.uint8),
        ([[-5, 0, 3]], np.int32),
        ([[0.0, 0.001, 1.0]], np.float32),
    ],
)
def test_a_mask_is_whatever_is_not_zero(tmp_path, values, dtype):
    labels = np.array(values, dtype)
    file = save(tmp_path / "mask.tif", Image.fromarray(labels))
    for source in (file, labels):
        np.testing.assert_array_equal(open_mask(source), labels != 0)


def test_a_palette_mask_is_judged_by_its_index_where_index_0_is_black(tmp_path):
    mask = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8)).convert("P")
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    assert open_mask(save(tmp_path / "mask.png", mask)).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_the_alpha_of_a_mask_does_not_count(mode):
    mask = Image.fromarray(np.array([[0, 1]], np.uint8))
    if mode == "PA":
        mask.putpalette([0, 0, 0, 9, 9, 9])
    mask = mask.convert(mode)
    mask.putalpha(255)
    assert open_mask(mask).tolist() == [[False, True]]


def test_a_colour_mask_is_judged_by_any_channel_and_stands_upright(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 1, 2] = 1
    exif = Image.Exif()
    exif[0x0112] = 3
    mask = open_mask(save(tmp_path / "mask.png", Image.fromarray(pixels), exif=exif))
    assert np.argwhere(mask).tolist() == [[1, 1]]


# --- image files that cannot be used ---


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + png_chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(10_000, 10_000), (30_000, 30_000)])
def test_decompression_bomb(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    with pytest.raises(
        InputError, match="bomb.png has more pixels than the limit of 89,478,485; shrink or crop"
    ):
        open_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(tmp_path, kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: max(1, int(len(data) * share))])
    with pytest.raises(InputError, match="cut is (truncated or damaged|not an image)"):
        open_image(path)


def test_truncated_image_in_memory():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    lazy = Image.open(io.BytesIO(encoded(noise, "PNG")[:5000]))
    with pytest.raises(InputError, match="Pillow image is truncated or damaged"):
        open_image(lazy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (b"patient,age\n1,40\n", "is not an image"),
        (b"\0" * 5000, "is not an image"),
    ],
)
def test_not_an_image(tmp_path, content, message):
    path = tmp_path / "file.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"file.png {message}"):
        open_image(path)


def test_missing_and_folder(tmp_path):
    with pytest.raises(InputError, match="nothing.png does not exist"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="is a folder"):
        open_image(str(tmp_path))


def test_several_frames(tmp_path):
    frames = [gradient("L").rotate(angle) for angle in (0, 90, 180)]
    path = save(tmp_path / "stack.tif", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="holds 3 frames"):
        open_image(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Image.new("RGB", (0, 5)), r"no pixels \(0x5"),
        (np.zeros((0, 5), np.uint8), r"no pixels \(5x0"),
        (np.zeros((0, 5), np.float32), r"no pixels \(5x0"),
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.zeros(4, np.uint8), "shape"),
        (np.zeros((4, 4), complex), "complex"),
        (np.array([[0.0, np.nan]]), "not finite"),
    ],
)
def test_unusable_images_in_memory(source, message):
    with pytest.raises(InputError, match=message):
        open_image(source)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(
    st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"]),
    st.binary(max_size=60),
    st.integers(0, 700),
)
@settings(max_examples=200)
def test_damaged_bytes_never_escape(tmp_path_factory, kind, garbage, position):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    gradient("RGB").save(buffer, kind, exif=exif)
    data = bytearray(buffer.getvalue())
    data[position : position + len(garbage)] = garbage
    path = tmp_path_factory.mktemp("damaged") / "image"
    path.write_bytes(bytes(data))
    try:
        assert open_image(path)[0].mode == "RGB"
    except InputError as error:
        assert "\n" not in str(error)


def test_sixteen_bit_colour_is_refused(tmp_path):
    """Pillow would keep the upper byte alone, which leaves nothing of 12-bit data."""
    pixels = np.full((4, 5, 3), 4000, ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    file = tmp_path / "colour16.png"
    parts = png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(InputError, match="16 bits a colour channel"):
        open_image(file)
