"""One rule for what is inside a mask, whatever file it comes in and whoever reads it."""

import io

import numpy as np
import pytest
from PIL import Image, features
from small_datasets import coco_table, save_picture, write_table
from tiff_files import tiff

from unibiomed_jax.data.files import check_files
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.data.tables import read_dataset
from unibiomed_jax.data.transforms import load_mask
from unibiomed_jax.datasets.build import BuildOptions, build
from unibiomed_jax.datasets.validate import ValidateOptions, validate
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.formats import losses
from unibiomed_jax.inputs.masks import open_mask
from unibiomed_jax.inputs.regions import box_masks, region_cells

# What is drawn in all of these files.
SIZE = (60, 30)
SQUARE = np.zeros(SIZE[::-1], bool)
SQUARE[4:24, 10:40] = True
WHITE, BLACK, RED, GREEN = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0)
# The first colours of Pascal VOC.
VOC = (BLACK, (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128,) * 3)


def as_file(image: Image.Image, kind="PNG", **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer


def grey(outside=0, inside=255, dtype=np.uint8) -> Image.Image:
    return Image.fromarray(np.where(SQUARE, inside, outside).astype(dtype))


def colour(outside, inside) -> Image.Image:
    return Image.fromarray(np.where(SQUARE[..., None], inside, outside).astype(np.uint8))


def palette(colours, outside=0, inside=1) -> Image.Image:
    image = Image.fromarray(np.where(SQUARE, inside, outside).astype(np.uint8))
    image.putpalette([part for entry in colours for part in entry])
    return image


def refused(source, message):
    with pytest.raises(InputError, match=message) as error:
        open_mask(source)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(SQUARE),
        grey(),
        grey(inside=1),
        grey(inside=7),
        grey(inside=1, dtype=np.uint16),
        grey(inside=40000, dtype=np.uint16),
        grey(inside=-3, dtype=np.int32),
        grey(inside=0.01, dtype=np.float32),
        grey().convert("LA"),
        grey().convert("RGBA"),
        colour(BLACK, GREEN),
        colour(BLACK, (0, 0, 1)),
        colour(BLACK, WHITE).convert("CMYK"),
        colour(BLACK, WHITE).convert("HSV"),
    ],
    ids=lambda image: image.mode,
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", None])
def test_black_is_outside_and_everything_else_inside(image, kind):
    if (
        kind
        and (image.mode, kind) not in (("F", "PNG"), ("I", "PNG"), ("CMYK", "PNG"))
        and image.mode != "HSV"
    ):
        image = as_file(image, kind)
    np.testing.assert_array_equal(open_mask(image), SQUARE)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint16, np.int64, np.float32, np.float64])
def test_arrays(dtype):
    for shape in ((30, 60), (30, 60, 1)):
        np.testing.assert_array_equal(open_mask(SQUARE.astype(dtype).reshape(shape)), SQUARE)
    channels = np.stack([SQUARE.astype(dtype)] * 4, -1)
    channels[..., 1:3] = 0
    np.testing.assert_array_equal(open_mask(channels[..., :3]), SQUARE)
    channels[..., 3] = 1
    np.testing.assert_array_equal(open_mask(channels), SQUARE)


def test_labels_are_all_inside():
    labels = np.zeros((4, 4), np.uint16)
    labels[1] = 1, 2, 300, 65535
    np.testing.assert_array_equal(open_mask(Image.fromarray(labels)), labels > 0)


def test_all_and_nothing():
    for value in (1, 255):
        assert open_mask(Image.new("L", (3, 2), value)).all()
    assert not open_mask(Image.new("L", (3, 2))).any() and not open_mask(Image.new("RGBA", (3, 2))).any()
    assert open_mask(Image.new("RGB", (3, 2), RED)).all() and open_mask(np.full((2, 3), 0.5)).all()


@pytest.mark.parametrize(
    "image",
    [
        grey(1, 2),
        grey(200, 201, np.uint16),
        grey(0.1, 0.9, np.float32),
        colour(WHITE, RED),
        colour(RED, GREEN),
    ],
    ids=["labels", "16 bits", "probabilities", "white and red", "red and green"],
)
def test_several_values_without_a_zero(image):
    refused(image, "The mask holds several values but no 0, which marks what is outside; set that to 0")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(tmp_path, value):
    values = SQUARE.astype(np.float32)
    values[0, 0] = value
    Image.fromarray(values).save(tmp_path / "mask.tif")
    for source in (values, tmp_path / "mask.tif"):
        refused(source, "holds values that are not finite")
    with pytest.raises(InputError, match="region1 cannot be used: .* not finite"):
        region_cells([values], SIZE)


@pytest.mark.parametrize("compressed", [False, True])
def test_white_as_zero(compressed):
    """As a viewer shows it: stored 0 is white, the highest number black."""
    bits = np.packbits(~SQUARE, axis=1).tobytes()
    files = [tiff(bits, SIZE, [1], 0, compressed=compressed)]
    for depth, dtype in ((8, "<u1"), (16, "<u2")):
        stored = np.where(SQUARE, 0, 2**depth - 1).astype(dtype)
        files.append(tiff(stored.tobytes(), SIZE, [depth], 0, compressed=compressed))
    for file in files:
        np.testing.assert_array_equal(open_mask(io.BytesIO(file)), SQUARE)
    labels = SQUARE.astype("<u2")  # nothing in it is shown black
    refused(
        io.BytesIO(tiff(labels.tobytes(), SIZE, [16], 0, compressed=compressed)), "several values but no 0"
    )


def test_several_pages(tmp_path):
    grey().save(tmp_path / "mask.tif", save_all=True, append_images=[grey()])
    refused(tmp_path / "mask.tif", r"mask\.tif holds 2 frames")


# ------------------------------------------------------------------------------------------------------------
# Compressed with losses


def lossy_files() -> dict[str, bytes]:
    files = {
        "JPEG": as_file(grey(), "JPEG", quality=50),
        "JPEG in colours": as_file(colour(BLACK, GREEN), "JPEG", quality=60, subsampling=0),
        "WebP": as_file(grey(), "WEBP", quality=50),
        "WebP with alpha": as_file(Image.merge("RGBA", [grey()] * 3 + [grey(254)]), "WEBP", quality=50),
        "TIFF": as_file(grey(), "TIFF", compression="jpeg", quality=50),
        "MPO": as_file(grey(), "MPO", save_all=True, append_images=[grey(9)], quality=50),
    }
    if features.check("avif"):
        noise = np.random.default_rng(0).integers(0, 40, SQUARE.shape)
        noisy = np.where(SQUARE, 255 - noise, noise).astype(np.uint8)
        files["AVIF"] = as_file(Image.fromarray(noisy), "AVIF", quality=60)
    if features.check("jpg_2000"):
        options = {"irreversible": True, "quality_mode": "rates", "quality_layers": [5]}
        files["JPEG 2000"] = as_file(grey(), "JPEG2000", **options)
    return {name: file.getvalue() for name, file in files.items()}


@pytest.mark.parametrize("name", lossy_files())
@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_specks_of_compression_are_outside(tmp_path, name, ending):
    """By what the file is and not by its name."""
    file = tmp_path / f"mask.{ending}"
    file.write_bytes(lossy_files()[name])
    np.testing.assert_array_equal(open_mask(file), SQUARE)
    np.testing.assert_array_equal(open_mask(Image.open(file)), SQUARE)


def test_the_specks_are_there():
    """Without which the test above would test nothing."""
    for name, file in lossy_files().items():
        assert (np.asarray(Image.open(io.BytesIO(file)).convert("L")) > 0).sum() > SQUARE.sum(), name


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": True, "icc_profile": b"odd"}])
def test_files_without_losses_keep_their_labels(options):
    np.testing.assert_array_equal(
        open_mask(as_file(grey(inside=1).convert("RGB"), "WEBP", **options)), SQUARE
    )


@pytest.mark.parametrize(
    ("compression", "found"),
    [("raw", "none"), ("tiff_lzw", "none"), ("jpeg", "some"), ("tiff_jpeg", "some"), ("webp", "maybe")],
)
def test_compressions_of_tiff(compression, found):
    """Not all of which Pillow can write."""
    image = Image.open(as_file(grey(), "TIFF"))
    image.info["compression"] = compression
    assert losses(image) == found


@pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow without JPEG 2000")
def test_a_file_that_may_have_losses_is_taken_where_it_does_not_matter():
    np.testing.assert_array_equal(open_mask(as_file(grey(), "JPEG2000")), SQUARE)
    np.testing.assert_array_equal(open_mask(as_file(grey(inside=60000, dtype=np.uint16), "JPEG2000")), SQUARE)
    refused(
        as_file(grey(inside=1), "JPEG2000"), "JPEG2000 with values between black and white.*; save it as PNG"
    )


def test_an_image_in_memory_has_no_losses():
    file = lossy_files()["JPEG"]
    noisy = Image.open(io.BytesIO(file)).copy()
    assert open_mask(noisy).sum() == (np.asarray(noisy) > 0).sum() > SQUARE.sum()


# ------------------------------------------------------------------------------------------------------------
# Palettes


def test_label_maps_count_by_their_indices():
    for inside in range(1, 8):
        np.testing.assert_array_equal(open_mask(as_file(palette(VOC, inside=inside))), SQUARE)
    labels = np.array([[1, 2, 3]], np.uint8)  # nothing outside
    image = Image.fromarray(labels)
    image.putpalette([part for entry in VOC for part in entry])
    assert open_mask(as_file(image)).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_black_and_white_in_any_order(kind):
    for image in (
        palette((WHITE, BLACK), outside=1, inside=0),
        palette((BLACK, WHITE, RED)),
        palette(((9, 9, 9), BLACK, (200, 200, 200)), outside=1, inside=2),
        palette((WHITE, BLACK, RED), outside=1, inside=0),  # the red is not in use
        grey().quantize(2),
        grey().convert("P", palette=Image.Palette.ADAPTIVE, colors=2),
        colour(BLACK, WHITE).convert("P"),  # the web palette, in which indices 0 to 10 are black
    ):
        np.testing.assert_array_equal(open_mask(as_file(image, kind)), SQUARE)


def test_a_single_colour():
    white = Image.new("L", SIZE, 255)
    for image in (white.quantize(2), white.convert("RGB").convert("P")):
        assert open_mask(as_file(image)).all()
    for image in (Image.new("L", SIZE).quantize(2), Image.new("RGB", SIZE).convert("P")):
        assert not open_mask(as_file(image)).any()


def three_colours() -> Image.Image:
    """White outside, red inside, and somewhere a black pixel."""
    image = palette((WHITE, RED, BLACK))
    image.putpixel((0, 0), 2)
    return image


@pytest.mark.parametrize(
    "image",
    [
        palette((WHITE, RED)),
        three_colours(),
        palette((RED, BLACK), outside=1, inside=0),
        palette(((120,) * 3, (180, 120, 120)), inside=0),  # ADE20K: 0 is a wall
        palette(((250,) * 3, (3,) * 3), outside=1, inside=0),  # which of them is black?
        palette((BLACK, BLACK)),  # labels without colours
        palette((BLACK, BLACK), outside=1),
    ],
    ids=["white and red", "three", "red 0", "red palette", "no black", "no colours", "one index"],
)
def test_palettes_that_tell_two_tales(image):
    refused(as_file(image), "The mask is a palette image whose index 0 is not the only black")


def test_palettes_of_colours_without_black_and_indices_without_a_colour():
    refused(as_file(palette(((1, 2, 3), RED, GREEN), outside=1, inside=2)), "several colours but no black")
    refused(palette((BLACK, WHITE), inside=5), "pixels without a colour in its palette")
    bare = Image.fromarray(np.where(SQUARE, 5, 0).astype(np.uint8))
    assert bare.mode == "L"
    np.testing.assert_array_equal(open_mask(bare), SQUARE)


# ------------------------------------------------------------------------------------------------------------
# Alpha


def with_alpha(image: Image.Image, alpha: np.ndarray) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return image


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_one_alpha_for_all_pixels_says_nothing(mode, value):
    image = with_alpha(grey().convert(mode), np.full(SQUARE.shape, value))
    np.testing.assert_array_equal(open_mask(as_file(image)), SQUARE)


def test_alpha_may_say_the_same_as_the_colours():
    for alpha in (SQUARE * 255, SQUARE * 90, np.where(SQUARE, 255, 128)):
        np.testing.assert_array_equal(open_mask(as_file(with_alpha(colour(BLACK, RED), alpha))), SQUARE)
    np.testing.assert_array_equal(open_mask(as_file(grey(), transparency=0)), SQUARE)
    np.testing.assert_array_equal(open_mask(as_file(palette(VOC), transparency=0)), SQUARE)
    values = np.stack([SQUARE.astype(np.float32)] * 4, -1)
    np.testing.assert_array_equal(open_mask(values), SQUARE)


def test_a_drawing_in_the_alpha_channel():
    refused(as_file(with_alpha(grey(0, 0), SQUARE * 255)), "black wherever it can be seen; draw the target")
    refused(as_file(with_alpha(grey(255, 255), SQUARE * 255)), "transparent pixels that are not black")
    refused(as_file(with_alpha(grey(255, 255), ~SQUARE * 255)), "transparent pixels that are not black")
    refused(as_file(grey(), transparency=255), "transparent pixels that are not black")
    refused(as_file(palette((WHITE, BLACK)), transparency=0), "transparent pixels that are not black")
    values = np.ones((*SQUARE.shape, 4))
    values[..., 3] = SQUARE
    refused(values, "transparent pixels that are not black")


# ------------------------------------------------------------------------------------------------------------
# One rule for all who read masks


def oriented(image: Image.Image, orientation: int) -> io.BytesIO:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return as_file(image, exif=exif)


CASES = {
    "white first": as_file(palette((WHITE, BLACK), outside=1, inside=0)),
    "JPEG": as_file(grey(), "JPEG", quality=50),
    "turned": oriented(grey().transpose(Image.Transpose.ROTATE_90), 6),
    "green": as_file(colour(BLACK, GREEN)),
}


@pytest.mark.parametrize("name", CASES)
def test_building_checking_training_and_regions_agree(tmp_path, name):
    data = CASES[name].getvalue()
    for folder in ("train", "train_mask", "scans", "masks"):
        (tmp_path / folder).mkdir()
    for mask in ("train_mask/0_liver.png", "masks/0_liver.png"):
        (tmp_path / mask).write_bytes(data)
    for picture in ("train/0.png", "scans/0.png"):
        save_picture(tmp_path / picture, SIZE)
    write_table(tmp_path / "train.json", coco_table(1, width=60, height=30))
    # A table made by hand
    assert not validate(ValidateOptions(tmp_path)).problems
    (record,) = read_dataset(DatasetConfig(Kind.SEGMENTATION, str(tmp_path)))
    check_files([record])
    np.testing.assert_array_equal(load_mask(record.masks[0][0], SIZE, "record"), SQUARE)
    # A dataset that is built
    out = tmp_path / "out"
    options = BuildOptions(out, "MRI", "abdomen", tmp_path / "scans", tmp_path / "masks", fractions=(1, 0, 0))
    build(options)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "train_mask" / "0_liver.png")), SQUARE)
    # A region
    cells = region_cells([str(tmp_path / "masks" / "0_liver.png"), SQUARE], SIZE)
    np.testing.assert_array_equal(cells[0], cells[1])


def test_what_is_no_mask_is_an_error_for_all(tmp_path):
    save_picture(tmp_path / "train" / "0.png", SIZE)
    (tmp_path / "train_mask").mkdir()
    file = tmp_path / "train_mask" / "0_liver.png"
    file.write_bytes(as_file(palette((WHITE, RED))).getvalue())
    write_table(tmp_path / "train.json", coco_table(1))
    (problem,) = [
        problem for problem in validate(ValidateOptions(tmp_path)).errors if "segmentation" in problem.dataset
    ]
    assert problem.sort == "unreadable" and "0_liver.png is a palette image whose index 0" in problem.text
    with pytest.raises(InputError, match=r"0_liver\.png of a record cannot be read: .* palette image"):
        load_mask(str(file), SIZE, "a record")
    with pytest.raises(InputError, match="The mask of region1 cannot be used: .* palette image"):
        region_cells([file], SIZE)


def test_a_mask_that_lies_otherwise_than_its_image_is_refused(tmp_path):
    """The image is to be turned, its mask was drawn on the turned one without a word about it, and so on."""
    for folder in ("train", "train_mask"):
        (tmp_path / folder).mkdir()
    write_table(tmp_path / "train.json", coco_table(1))
    picture = Image.new("RGB", (30, 60))
    records = read_dataset(DatasetConfig(Kind.SEGMENTATION, str(tmp_path)))
    flat = grey().transpose(Image.Transpose.ROTATE_90)
    for image, mask, fits in (
        (oriented(picture, 6), oriented(flat, 6), True),
        (oriented(picture, 6), as_file(grey()), True),
        (oriented(picture, 6), as_file(flat), False),
        (as_file(picture), oriented(flat, 6), False),
    ):
        (tmp_path / "train" / "0.png").write_bytes(image.getvalue())
        (tmp_path / "train_mask" / "0_liver.png").write_bytes(mask.getvalue())
        sorts = {problem.sort for problem in validate(ValidateOptions(tmp_path)).problems}
        if fits:
            check_files(records)
            assert not sorts
            continue
        with pytest.raises(InputError, match=r"0_liver\.png of .* is \d+x\d+ pixels but its image"):
            check_files(records)
        assert sorts == {"mask size"}


@pytest.mark.parametrize("box", ["0 0 5 5", ("a", 0, 5, 5), [[0, 0], [5]], None, 5])
def test_boxes_of_other_kinds_are_refused(box):
    with pytest.raises(InputError, match="Box 1 is .*; give four numbers x0, y0, x1, y1 in pixels"):
        box_masks([box], SIZE)


def test_regions_may_be_lists_and_ragged_ones_are_refused():
    np.testing.assert_array_equal(region_cells([SQUARE.tolist()], SIZE), region_cells([SQUARE], SIZE))
    for region in ([[1, 0], [1]], "nowhere.png", 5):
        with pytest.raises(InputError, match="The mask of region1 cannot be used"):
            region_cells([region], SIZE)
