"""Opening images, tiling, normalisation and regions."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from places import GOLDEN

from unibiomed_jax.config.model import PIXEL_MEAN, PIXEL_STD
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.images import open_frames, open_image, open_mask
from unibiomed_jax.inputs.regions import box_masks, region_cells
from unibiomed_jax.inputs.tiles import frame_tiles, normalize, sam_image, tile_grid, vit_tiles

ABDOMEN = GOLDEN / "images" / "CT_abdomen.png"

# The candidate grids in the order in which the original implementation visits them.
GRIDS = [
    (1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (4, 1), (1, 4), (5, 1), (1, 5), (1, 6), (6, 1),
    (3, 2), (2, 3), (7, 1), (1, 7), (4, 2), (2, 4), (1, 8), (8, 1), (1, 9), (3, 3), (9, 1), (2, 5),
    (5, 2), (10, 1), (1, 10), (11, 1), (1, 11), (12, 1), (3, 4), (4, 3), (1, 12), (6, 2), (2, 6),
]  # fmt: skip


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def golden(name: str, key: str) -> np.ndarray:
    return np.load(GOLDEN / "micro" / f"{name}.npz")[key]


def golden_frames() -> list[Image.Image]:
    image = open_image(ABDOMEN)[0].resize((410, 410))
    return [image.crop((10 * i, 12 * i, 10 * i + 320, 12 * i + 240)) for i in range(8)]


# --- against the recorded pixels, bit for bit ---


@pytest.mark.parametrize("case", ["image_abdomen", "region_abdomen"])
def test_image_equals_recorded_pixels(case):
    image, record = open_image(ABDOMEN)
    assert (record.format, record.mode, record.width, record.height, record.steps) == (
        "PNG",
        "RGB",
        410,
        410,
        (),
    )
    tiles = vit_tiles(image, tile_size=112)
    assert tiles.dtype == np.float32
    np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), golden(case, "pixel_values"))
    np.testing.assert_array_equal(
        sam_image(image, 256).transpose(2, 0, 1), golden(case, "g_pixel_values0")[0]
    )


def test_wide_image_equals_recorded_pixels():
    image, _ = open_image(ABDOMEN)
    tiles = vit_tiles(image.crop((0, 0, 410, 200)), tile_size=112)
    np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), golden("image_noseg", "pixel_values"))


def test_frames_equal_recorded_pixels():
    frames = golden_frames()
    tiles = frame_tiles(frames[:5], tile_size=112)
    np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), golden("video8", "pixel_values"))
    sam = sam_image(frames[0], 256)
    np.testing.assert_array_equal(sam.transpose(2, 0, 1), golden("video8", "g_pixel_values0")[0])


# --- tiling ---


@pytest.mark.parametrize(
    ("size", "grid", "tiles"),
    [
        ((256, 256), (1, 1), 1),
        ((512, 512), (1, 1), 1),
        ((633, 633), (1, 1), 1),
        ((634, 634), (2, 2), 5),
        ((640, 640), (2, 2), 5),
        ((800, 800), (2, 2), 5),
        ((950, 950), (2, 2), 5),
        ((951, 951), (3, 3), 10),
        ((1024, 1024), (3, 3), 10),
        ((1024, 512), (2, 1), 3),
        ((600, 800), (3, 4), 13),
        ((800, 600), (4, 3), 13),
        ((640, 480), (4, 3), 13),
        ((1280, 720), (4, 2), 9),
        ((300, 900), (1, 3), 4),
        ((50, 500), (1, 10), 11),
    ],
)
def test_known_grids(size, grid, tiles):
    assert tile_grid(*size) == grid
    assert len(vit_tiles(Image.new("RGB", size), tile_size=448)) == tiles


sides = st.integers(1, 5000)


@given(sides, sides)
@settings(max_examples=500)
def test_grid_equals_the_loop_over_the_original_order(width, height):
    best, best_difference = None, float("inf")
    for columns, rows in GRIDS:
        difference = abs(width / height - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and width * height > 0.5 * 448 * 448 * columns * rows:
            best = (columns, rows)
    assert tile_grid(width, height) == best


@given(sides, sides, st.integers(1, 6), st.integers(0, 10), st.sampled_from([14, 112, 448]))
def test_grid_is_within_limits_and_closest(width, height, min_tiles, more, tile_size):
    max_tiles = min_tiles + more
    limits = {"min_tiles": min_tiles, "max_tiles": max_tiles, "tile_size": tile_size}
    columns, rows = tile_grid(width, height, **limits)
    assert min_tiles <= columns * rows <= max_tiles
    every = [(c, r) for c in range(1, 17) for r in range(1, 17) if min_tiles <= c * r <= max_tiles]
    difference = abs(width / height - columns / rows)
    assert difference == min(abs(width / height - c / r) for c, r in every)
    # Among grids that are as close, the largest that the image's pixels justify.
    justified = [
        c * r
        for c, r in every
        if abs(width / height - c / r) == difference and width * height > 0.5 * tile_size**2 * c * r
    ]
    if justified:
        assert columns * rows == max(justified)
    assert tile_grid(width, height, **limits) == (columns, rows)


def test_grid_limits_are_checked():
    with pytest.raises(InputError, match="min_tiles=3, max_tiles=2"):
        tile_grid(10, 10, min_tiles=3, max_tiles=2)


def test_tiles_are_row_major_with_the_thumbnail_last():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[..., 0] = [[10, 20, 30], [40, 50, 60]]
    image = Image.fromarray(pixels.repeat(40, 0).repeat(40, 1))
    tiles = vit_tiles(image, tile_size=16)
    assert len(tiles) == 7
    centres = tiles[:, 8, 8, 0] * PIXEL_STD[0] + PIXEL_MEAN[0]
    np.testing.assert_allclose(centres[:6] * 255, [10, 20, 30, 40, 50, 60], atol=1e-3)
    np.testing.assert_array_equal(
        tiles[6], normalize(np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)))
    )
    assert len(vit_tiles(image, tile_size=16, use_thumbnail=False)) == 6
    assert len(vit_tiles(image, tile_size=16, max_tiles=1)) == 1


def test_normalize_is_imagenets():
    white = normalize(np.full((1, 1, 3), 255, np.uint8))
    np.testing.assert_allclose(
        white[0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-6
    )


# --- image files of every kind ---


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


def test_a_palette_mask_is_judged_by_its_index(tmp_path):
    mask = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8)).convert("P")
    mask.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9])  # the background is white and label 1 black
    assert open_mask(save(tmp_path / "mask.png", mask)).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_the_alpha_of_a_mask_does_not_count(mode):
    mask = Image.fromarray(np.array([[0, 1]], np.uint8))
    if mode == "PA":
        mask.putpalette([9, 9, 9, 0, 0, 0])
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


# --- regions ---


def test_regions_equal_the_recorded_prompt():
    y, x = np.mgrid[:410, :410]
    masks = np.zeros((2, 410, 410), np.float32)
    masks[0, 82:184, 123:246] = 1
    masks[1] = (y - 287) ** 2 + (x - 205) ** 2 < 61.5**2
    cells = region_cells(masks, (410, 410), grid=4)
    text = str(golden("region_abdomen", "input_text"))
    recorded = [part.split("</vp>")[0].count("<IMG_CONTEXT>") for part in text.split("<vp>")[1:]]
    assert cells.sum((1, 2)).tolist() == recorded


@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from([4, 8, 16]), st.data())
def test_cells_read_the_pixel_under_the_floor(width, height, grid, data):
    row, column = data.draw(st.integers(0, grid - 1)), data.draw(st.integers(0, grid - 1))
    mask = np.zeros((height, width))
    mask[row * height // grid, column * width // grid] = 1
    cells = region_cells([mask], (width, height), grid)
    for i in range(grid):
        for j in range(grid):
            assert cells[0, i, j] == (mask[int(i * height / grid), int(j * width / grid)] == 1)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([], "empty; give at least one"),
        (
            [np.ones((20, 30)), np.ones((30, 20))],
            r"region2 has the shape \(30, 20\) but the image has 20 rows and 30",
        ),
        ([np.ones((20, 30, 1))], "region1 has the shape"),
        ([np.zeros((20, 30))], "region1 is empty"),
    ],
)
def test_unusable_regions(masks, message):
    with pytest.raises(InputError, match=message):
        region_cells(masks, (30, 20))


def test_region_between_the_points_of_the_grid():
    mask = np.zeros((320, 320), bool)
    mask[1:19, 1:19] = True
    with pytest.raises(InputError, match="region1 holds no point of the 16x16 grid"):
        region_cells([mask], (320, 320))


def test_boxes():
    masks = box_masks([(1, 2, 4, 3), (0.5, 0.5, 1.5, 1.5)], (5, 4))
    assert masks.shape == (2, 4, 5)
    assert np.argwhere(masks[0]).tolist() == [[2, 1], [2, 2], [2, 3]]
    assert np.argwhere(masks[1]).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    "box", [(0, 0, 6, 4), (-1, 0, 2, 2), (2, 2, 2, 3), (3, 0, 1, 2), (0, 0, 1), (0, 0, 1, np.nan)]
)
def test_unusable_boxes(box):
    with pytest.raises(InputError, match="Box 1"):
        box_masks([box], (5, 4))


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
