"""Every sense in which a file's numbers can be meant: read so, or refused by name."""

import io
import os
import struct
import threading
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms, features
from tiff_files import tiff

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.images import open_frames, open_image

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
INVERTED = "white-is-zero inverted"


def grey(source) -> list[int]:
    """The first row of an image whose channels are equal."""
    pixels = np.asarray(open_image(source)[0])
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


def packed(values, bits) -> bytes:
    """Samples of fewer than 8 bits, or of 12, one after the other."""
    number = 0
    for value in values:
        number = number << bits | value
    unused = -len(values) * bits % 8
    return (number << unused).to_bytes((len(values) * bits + unused) // 8, "big")


def refused(source, message):
    with pytest.raises(InputError, match=message) as error:
        open_image(source)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# Grey TIFF files


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (1, [0, 1, 1, 0], [0, 255, 255, 0]),
        (2, [0, 1, 2, 3], [0, 85, 170, 255]),
        (4, [0, 1, 9, 15], [0, 17, 153, 255]),
        (8, [0, 1, 200, 255], [0, 1, 200, 255]),
    ],
)
def test_few_bits_in_either_sense(bits, values, expected, order, compressed):
    def file(photometric):
        data = packed(values, bits)
        return io.BytesIO(tiff(data, (4, 1), [bits], photometric, order=order, compressed=compressed))

    assert grey(file(BLACK_IS_ZERO)) == expected
    assert grey(file(WHITE_IS_ZERO)) == [255 - value for value in expected]
    assert INVERTED in open_image(file(WHITE_IS_ZERO))[1].steps
    assert INVERTED not in open_image(file(BLACK_IS_ZERO))[1].steps


@pytest.mark.parametrize("compressed", [False, True])
def test_sixteen_bits_with_white_as_zero_are_inverted(tmp_path, compressed):
    """As its 8-bit twin: what a viewer shows white is white."""
    ramp = np.linspace(0, 4095, 64).astype("<u2")
    file = tmp_path / "radiograph.tif"
    file.write_bytes(tiff(ramp.tobytes(), (64, 1), [16], WHITE_IS_ZERO, compressed=compressed))
    image, record = open_image(file)
    expected = np.rint((4095 - ramp.astype(float)) * 255 / 4095)
    np.testing.assert_array_equal(np.asarray(image)[0, :, 0], expected)
    assert record.steps == (INVERTED, "I;16 values 61440..65535 scaled linearly to 0..255")
    plain = tmp_path / "plain.tif"
    plain.write_bytes(tiff(ramp.tobytes(), (64, 1), [16], BLACK_IS_ZERO, compressed=compressed))
    assert grey(plain)[0] == 0 and grey(file)[0] == 255


def test_white_as_zero_stands_upright_and_shares_its_scale():
    values = np.array([[0, 1000], [2000, 4000], [3000, 500]], "<u2")
    data = tiff(values.tobytes(), (2, 3), [16], WHITE_IS_ZERO, t274=6)
    image, record = open_image(io.BytesIO(data))
    expected = np.rint((4000.0 - np.rot90(values, -1)) * 255 / 4000)
    np.testing.assert_array_equal(np.asarray(image)[..., 0], expected)
    assert (record.width, record.height) == (3, 2)
    assert record.steps[:2] == ("EXIF orientation 6 applied", INVERTED)
    same = tiff((4000 - values).astype("<u2").tobytes(), (2, 3), [16], BLACK_IS_ZERO)
    (frame, _), _ = open_frames([io.BytesIO(same), io.BytesIO(same)])
    np.testing.assert_array_equal(np.asarray(frame), np.rot90(np.asarray(image)))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "sample_format", "values"),
    [
        ("<u1", 1, [0, 1, 200, 255]),
        ("<i1", 2, [-128, -1, 0, 127]),
        ("<u2", 1, [0, 1, 40000, 65535]),
        ("<i2", 2, [-32768, -1, 0, 32767]),
        ("<u4", 1, [0, 1, 3000000000, 4294967295]),
        ("<i4", 2, [-2147483648, -1, 0, 2147483647]),
        ("<f4", 3, [-1.5, 0, 0.25, 2]),
        (">u1", 1, [0, 1, 200, 255]),
        (">i1", 2, [-128, -1, 0, 127]),
        (">u2", 1, [0, 1, 40000, 65535]),
        (">i2", 2, [-32768, -1, 0, 32767]),
        (">i4", 2, [-2147483648, -1, 0, 2147483647]),
        (">f4", 3, [-1.5, 0, 0.25, 2]),
    ],
)
def test_signs_formats_and_orders_of_bytes(dtype, sample_format, values, compressed):
    """Right where Pillow is, put right where it takes another sign, refused where it mixes up bytes."""
    stored = np.array(values, dtype)
    options = {"order": dtype[0].replace("|", "<"), "compressed": compressed, "t339": sample_format}
    bits = stored.dtype.itemsize * 8
    file = io.BytesIO(tiff(stored.tobytes(), (4, 1), [bits], BLACK_IS_ZERO, **options))
    if compressed and dtype in (">i2", ">i4", ">f4"):
        refused(file, "compressed big-endian order.*; convert it to PNG")
        return
    low, high = float(stored.min()), float(stored.max())
    expected = np.rint((stored.astype(np.float64) - low) * 255 / (high - low))
    assert grey(file) == expected.tolist()


def test_twelve_bits(tmp_path):
    file = tmp_path / "twelve.tif"
    file.write_bytes(tiff(packed([0, 1, 2000, 4095], 12), (4, 1), [12], BLACK_IS_ZERO))
    assert grey(file) == [0, 0, 125, 255]


def test_tiff_files_without_a_sense():
    values = np.array([0, 0.5, 1, 2], "<f4")
    refused(
        io.BytesIO(tiff(values.tobytes(), (4, 1), [32], WHITE_IS_ZERO, t339=3)),
        "open file is a TIFF file of floating numbers with white as zero.* cannot be read rightly",
    )
    refused(
        io.BytesIO(tiff(bytes([0, 1, 200, 255]), (4, 1), [8], None)), "whether its zero is black or white"
    )


# ------------------------------------------------------------------------------------------------------------
# Planes and colours of TIFF files


COLOURS = np.array([[[10, 20, 30], [200, 100, 50]]], np.uint8)


def planes(pixels) -> list[bytes]:
    return [pixels[..., channel].tobytes() for channel in range(pixels.shape[-1])]


@pytest.mark.parametrize("compressed", [False, True])
def test_colours_pixel_by_pixel_and_plane_by_plane(compressed):
    alpha = np.concatenate([COLOURS, np.array([[[128], [255]]], np.uint8)], -1)
    for pixels, tags in ((COLOURS, {}), (alpha, {"t338": 2})):
        bits = [8] * pixels.shape[-1]
        for data, planar in ((pixels.tobytes(), 1), (planes(pixels), 2)):
            file = tiff(data, (2, 1), bits, RGB, compressed=compressed, t284=planar, **tags)
            opened, record = open_image(io.BytesIO(file))
            np.testing.assert_array_equal(np.asarray(opened), COLOURS)
            assert record.steps == (("alpha channel dropped",) if tags else ())


@pytest.mark.parametrize("compressed", [False, True])
def test_a_single_plane(compressed):
    """Some programs call one channel planar: Pillow then forgets its layout, but in a compressed file."""

    def file(data, bits, photometric):
        return io.BytesIO(tiff(data, (4, 1), [bits], photometric, compressed=compressed, t284=2))

    values, deep = bytes([0, 1, 200, 255]), np.array([0, 1000, 2000, 4000], "<u2").tobytes()
    assert grey(file(values, 8, BLACK_IS_ZERO)) == list(values)
    assert grey(file(packed([0, 1, 1, 0], 1), 1, BLACK_IS_ZERO)) == [0, 255, 255, 0]
    if compressed:
        assert grey(file(values, 8, WHITE_IS_ZERO)) == [255, 254, 55, 0]
        assert grey(file(packed([0, 1, 1, 0], 1), 1, WHITE_IS_ZERO)) == [255, 0, 0, 255]
        assert grey(file(deep, 16, WHITE_IS_ZERO)) == [255, 191, 128, 0]
    else:
        refused(file(values, 8, WHITE_IS_ZERO), "white as zero in a plane of its own")
        refused(file(packed([0, 1, 1, 0], 1), 1, WHITE_IS_ZERO), "white as zero in a plane of its own")
        refused(file(deep, 16, WHITE_IS_ZERO), "in separate planes of this kind")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
def test_sixteen_bit_colours_are_refused(planar, compressed):
    pixels = COLOURS.astype("<u2") * 257
    data = pixels.tobytes() if planar == 1 else planes(pixels)
    file = tiff(data, (2, 1), [16] * 3, RGB, compressed=compressed, t284=planar)
    refused(io.BytesIO(file), "16 bits a colour channel.*; convert it to 8 bits first")


def test_premultiplied_alpha():
    grey_alpha = np.array([[[60, 128], [50, 255]]], np.uint8)
    file = tiff(grey_alpha.tobytes(), (2, 1), [8] * 2, BLACK_IS_ZERO, t338=1)
    assert grey(io.BytesIO(file)) == [119, 50]  # of 60 at half the light, and of 50
    for compressed in (False, True):
        file = tiff(planes(grey_alpha), (2, 1), [8] * 2, BLACK_IS_ZERO, compressed=compressed, t338=1, t284=2)
        with pytest.raises(InputError, match="open file"):
            open_image(io.BytesIO(file))


def test_cmyk_and_other_inks():
    inks = np.array([[[10, 20, 30, 128], [0, 0, 0, 0]]], np.uint8)
    file = tiff(inks.tobytes(), (2, 1), [8] * 4, CMYK)
    opened, record = open_image(io.BytesIO(file))
    assert np.asarray(opened).tolist() == [[[122, 117, 112], [255, 255, 255]]]
    assert record.steps == ("CMYK converted to RGB without a colour profile",)
    refused(io.BytesIO(tiff(inks.tobytes(), (2, 1), [8] * 4, CMYK, t332=2)), "of other inks than CMYK")


def test_ycbcr():
    stored = np.asarray(Image.fromarray(COLOURS).convert("YCbCr"))
    whole = tiff(stored.tobytes(), (2, 1), [8] * 3, YCBCR, t530=[1, 1])
    np.testing.assert_allclose(np.asarray(open_image(io.BytesIO(whole))[0]), COLOURS, atol=2)
    for tags in ({}, {"t530": [2, 2]}):  # without the tag, two by two pixels share their colour
        refused(
            io.BytesIO(tiff(stored.tobytes(), (2, 1), [8] * 3, YCBCR, **tags)), "uncompressed YCbCr with sha"
        )


def test_palettes():
    colours = np.zeros((3, 256), int)
    colours[:, 1] = 65535, 257 * 128, 0
    file = tiff(bytes([0, 1]), (2, 1), [8], PALETTE, t320=colours.reshape(-1).tolist())
    opened, record = open_image(io.BytesIO(file))
    assert np.asarray(opened).tolist() == [[[0, 0, 0], [255, 128, 0]]]
    assert record.steps == ("palette image converted to RGB",)
    # A colour table of 8 bits, which is not allowed, looks black to Pillow.
    eight = tiff(bytes([0, 1]), (2, 1), [8], PALETTE, t320=(colours // 257).reshape(-1).tolist())
    refused(io.BytesIO(eight), "a palette of nothing but black; convert it to RGB")


# ------------------------------------------------------------------------------------------------------------
# Other formats


def saved(image: Image.Image, kind: str, **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer


def test_cmyk_jpeg_says_which_way_round():
    image = Image.new("CMYK", (16, 16), (0, 100, 200, 30))
    data = saved(image, "JPEG", quality=100).getvalue()
    opened, _ = open_image(io.BytesIO(data))
    np.testing.assert_allclose(np.asarray(opened)[0, 0], np.asarray(image.convert("RGB"))[0, 0], atol=4)
    start = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[start + 2 : start + 4])[0]
    assert data[start + 4 : start + 9] == b"Adobe"
    refused(io.BytesIO(data[:start] + data[start + 2 + length :]), "a CMYK JPEG that does not say")


@pytest.mark.parametrize(("kind", "depth"), [("P5", 65535), ("P6", 65535), ("P6", 4095)])
def test_portable_maps_of_more_than_eight_bits(kind, depth):
    samples = np.array([[1, depth // 2, depth]] * (3 if kind == "P6" else 1), ">u2")
    file = io.BytesIO(f"{kind} 3 1 {depth}\n".encode() + samples.tobytes())
    if kind == "P6":
        refused(file, "16 bits a colour channel")
    else:
        assert grey(file) == [0, 127, 255]


def test_portable_maps_of_fewer_bits():
    assert grey(io.BytesIO(b"P4 4 1\n\x60")) == [255, 0, 0, 255]  # 1 is black there
    assert grey(io.BytesIO(b"P5 2 1 3\n\x00\x01")) == [0, 85]


@pytest.mark.parametrize("channels", [1, 3])
def test_sgi_files_of_sixteen_bits_are_refused(channels):
    head = struct.pack(">HBBHHHH", 474, 0, 2, 2 + (channels == 3), 2, 1, channels).ljust(512, b"\0")
    refused(io.BytesIO(head + b"\1\0" * 2 * channels), "16 bits a colour channel")


def test_fits_files_are_refused():
    """Pillow takes their signed numbers for unsigned ones and leaves their scale aside."""
    cards = ("SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 2", "NAXIS2  = 1", "END")
    head = "".join(f"{card:80}" for card in cards).encode().ljust(2880)
    refused(
        io.BytesIO(head + np.array([-5, 7], ">i2").tobytes().ljust(2880, b"\0")),
        "the format FITS, whose scale",
    )


@pytest.mark.parametrize("kind", ["BMP", "DIB"])
def test_bitmaps_of_two_greys(kind):
    """Pillow takes 8 bits a pixel for one where a palette is black and white, in this order."""
    drawn = np.random.default_rng(0).integers(0, 2, (20, 30), np.uint8)
    expected = drawn[..., None].repeat(3, -1) * 255
    opened, _ = open_image(saved(Image.fromarray(drawn > 0), kind))
    np.testing.assert_array_equal(np.asarray(opened), expected)
    image = Image.fromarray(drawn)
    image.putpalette([0, 0, 0, 255, 255, 255])
    refused(saved(image, kind), "a palette of 2 greys that would be misread; save it as PNG")
    image.putpalette([255, 255, 255, 0, 0, 0])
    np.testing.assert_array_equal(np.asarray(open_image(saved(image, kind))[0]), 255 - expected)
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 32))
    np.testing.assert_array_equal(np.asarray(open_image(saved(ramp, kind))[0])[..., 0], np.asarray(ramp))


@pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow without JPEG 2000")
def test_jpeg_2000_of_other_depths():
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    np.testing.assert_array_equal(
        np.asarray(open_image(saved(Image.fromarray(ramp), "JPEG2000"))[0])[..., 0],
        np.rint(ramp * (255 / ramp.max())),
    )
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    data = bytearray(saved(colour, "JPEG2000").getvalue())
    np.testing.assert_array_equal(np.asarray(open_image(io.BytesIO(bytes(data)))[0]), np.asarray(colour))
    depths = data.index(b"\xff\x4f\xff\x51") + 42  # of the three channels, every third byte
    for depth, message in (
        (15, "16 bits a colour channel"),
        (135, "of signed samples"),
        (3, "4-bit samples"),
    ):
        data[depths : depths + 9 : 3] = bytes([depth] * 3)
        refused(io.BytesIO(bytes(data)), message)


def test_modes_that_only_programs_make():
    hsv = Image.fromarray(COLOURS).convert("HSV")
    opened, record = open_image(hsv)
    np.testing.assert_allclose(np.asarray(opened), COLOURS, atol=3)
    assert record.steps == ("HSV converted to RGB",)
    for mode in ("La", "RGBa", "PA", "RGBX", "YCbCr", "I;16", "I;16L", "I;16B", "I;16N"):
        assert open_image(Image.new(mode, (2, 1)))[0].mode == "RGB"


# ------------------------------------------------------------------------------------------------------------
# Colour profiles, gamma, transparency, several pictures: pixels as stored, and said so


def test_a_colour_profile_is_named_and_not_applied():
    image = Image.fromarray(COLOURS)
    profiles = {
        name: ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes() for name in ("LAB", "sRGB")
    }
    for kind in ("PNG", "TIFF"):
        opened, record = open_image(saved(image, kind, icc_profile=profiles["LAB"]))
        np.testing.assert_array_equal(np.asarray(opened), COLOURS)
        assert record.steps == ("colour profile Lab identity built-in not applied",)
        assert open_image(saved(image, kind, icc_profile=profiles["sRGB"]))[1].steps == ()
        damaged = open_image(saved(image, kind, icc_profile=b"no profile"))[1]
        assert damaged.steps == ("colour profile without a name not applied",)


def test_gamma_is_named_and_not_applied():
    def with_gamma(value):
        data = saved(Image.fromarray(COLOURS), "PNG").getvalue()
        chunk = b"gAMA" + struct.pack(">I", value)
        chunk = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return io.BytesIO(data[:33] + chunk + data[33:])

    opened, record = open_image(with_gamma(100_000))
    np.testing.assert_array_equal(np.asarray(opened), COLOURS)
    assert record.steps == ("gamma 1 not applied",)
    assert open_image(with_gamma(45_455))[1].steps == ()


def test_a_transparent_colour_is_kept():
    image = Image.fromarray(COLOURS)
    opened, record = open_image(saved(image, "PNG", transparency=(10, 20, 30)))
    np.testing.assert_array_equal(np.asarray(opened), COLOURS)
    assert record.steps == ("transparent colour kept",)


def test_the_first_of_several_pictures():
    def several(kind):
        first, second = (Image.new("L", (16, 16), light) for light in (200, 50))
        return saved(first, kind, save_all=True, append_images=[second])

    opened, record = open_image(several("MPO"))
    np.testing.assert_allclose(np.asarray(opened), 200, atol=2)
    assert record.format == "MPO" and record.steps[0] == "picture 1 of 2 in the file"
    stack = several("TIFF")
    refused(stack, "open file holds 2 frames; save each")
    chosen = Image.open(stack)  # whoever opens a stack says himself which picture
    chosen.seek(1)
    opened, record = open_image(chosen)
    assert (np.asarray(opened) == 50).all() and record.steps[0] == "picture 2 of 2 in the file"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_in_the_record_of_every_format(kind):
    exif = Image.Exif()
    exif[0x0112] = 8
    opened, record = open_image(saved(Image.new("RGB", (30, 20)), kind, exif=exif))
    assert opened.size == (record.width, record.height) == (20, 30)
    assert record.steps == ("EXIF orientation 8 applied",) and record.format == kind


# ------------------------------------------------------------------------------------------------------------
# Other kinds of input


def test_open_files_and_arrays_of_other_libraries(tmp_path):
    image = Image.fromarray(COLOURS)
    image.save(tmp_path / "image.png")
    with open(tmp_path / "image.png", "rb") as file:
        file.read(5)
        opened, record = open_image(file)
    assert record.source == str(tmp_path / "image.png") and record.format == "PNG"
    np.testing.assert_array_equal(np.asarray(opened), COLOURS)

    class Tensor:
        def __array__(self, dtype=None, copy=None):
            return COLOURS

    for source, name in (
        (saved(image, "PNG"), "open file"),
        (jnp.asarray(COLOURS), "array"),
        (Tensor(), "array"),
    ):
        for _ in range(2):  # an open file is read from its beginning
            opened, record = open_image(source)
            np.testing.assert_array_equal(np.asarray(opened), COLOURS)
            assert record.source == name


def test_what_is_no_image_is_told_what_would_be_one(tmp_path):
    class OnDevice:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    image = Image.fromarray(COLOURS)
    refused([image, image], "A list is no image; give a path, an open file, .* open_volume")
    refused(None, "A NoneType is no image")
    refused(saved(image, "PNG").getvalue(), "A bytes is no image; give a path, an open file")
    refused(io.StringIO("text"), "open file is not an image")
    refused(io.BytesIO(), "open file is not an image")
    refused(OnDevice(), "The OnDevice cannot be read as an array .*cuda:0.*; make it a NumPy array")
    refused(np.ma.masked_array(COLOURS, mask=COLOURS > 50), "is a masked one; fill it")
    refused(np.array([["a", "b"]]), "has the type <U1")
    refused(tmp_path / ("x" * 300), r"x cannot be read \(File name too long\)")
    for source in (str(tmp_path), tmp_path, image, 5):
        with pytest.raises(InputError, match="is no sequence of frames; give a list"):
            open_frames(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_threads_share_an_image_that_is_not_read_yet(kind):
    """Pillow would read its file from several threads at once."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8))
    data = saved(noise, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {})).getvalue()
    expected = np.asarray(Image.open(io.BytesIO(data)))
    for _ in range(10):
        shared, found = Image.open(io.BytesIO(data)), []
        start = threading.Barrier(4)

        def read(shared=shared, found=found, start=start):
            start.wait()
            try:
                found.append(np.asarray(open_image(shared)[0]))
            except InputError as error:
                found.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for pixels in found:
            np.testing.assert_array_equal(pixels, expected)


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "MPO", "GIF", "stack", "damaged", "deep"])
def test_files_are_closed_again(tmp_path, kind):
    path, image = tmp_path / "file", Image.fromarray(COLOURS).resize((40, 40))
    if kind == "stack":
        image.save(path, "TIFF", save_all=True, append_images=[image])
    elif kind == "damaged":
        path.write_bytes(saved(image, "PNG").getvalue()[:-30])
    elif kind == "deep":
        Image.fromarray(np.arange(9, dtype=np.uint16).reshape(3, 3) * 999).save(path, "TIFF")
    elif kind == "MPO":
        image.save(path, kind, save_all=True, append_images=[image])
    else:
        image.save(path, kind)
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    try:
        opened = open_image(path)[0]
    except InputError as error:
        kept = error  # with all that it refers to
        assert kind in ("stack", "damaged") and kept
    else:
        assert opened.getpixel((0, 0)) is not None and opened.size in ((40, 40), (3, 3))
    after = set(os.listdir("/proc/self/fd")) if before else set()
    assert len(after) == len(before)
