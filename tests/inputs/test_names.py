"""Files of any name, and JSON as any system writes it."""

import io
import json
import math
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import MICRO, TINY
from small_datasets import SIZES, SMALL, coco_table, save_picture, save_square, write_table

from unibiomed_jax import checkpoint, cli
from unibiomed_jax.conversion import reading
from unibiomed_jax.data.files import check_files
from unibiomed_jax.data.mixture import find_datasets
from unibiomed_jax.data.pipeline import Pipeline, PipelineConfig
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.data.tables import read_dataset
from unibiomed_jax.datasets.build import BuildOptions, build
from unibiomed_jax.datasets.validate import ValidateOptions, validate
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import find_file, is_text, read_json, read_text, shown, spelled
from unibiomed_jax.inputs.images import open_image
from unibiomed_jax.inputs.prompt import build_prompt
from unibiomed_jax.inputs.tokenizer import Tokenizer

COMPOSED, APART = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
# A name of the bytes of another encoding, as Python gives it.
LATIN = os.fsdecode(b"caf\xe9")


@pytest.fixture
def any_name(tmp_path):
    """A place for names that are no text, and for two spellings of one name."""
    try:
        for name in (LATIN, COMPOSED, APART):
            (tmp_path / "try" / name).mkdir(parents=True)
    except (OSError, FileExistsError):
        pytest.skip("this file system takes no such names")
    shutil.rmtree(tmp_path / "try")
    return tmp_path


# ------------------------------------------------------------------------------------------------------------
# Names that are shown


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("scan é.png", "scan é.png"),
        (LATIN + ".png", r"caf\xe9.png"),
        (Path(LATIN) / "a.png", r"caf\xe9/a.png"),
        ("two\nlines\x1b[31m\u2028", r"two\nlines\x1b[31m\u2028"),
        ("half \ud800 of one", r"half \ud800 of one"),
        (r"a\b [red] 'quoted'", r"a\b [red] 'quoted'"),
    ],
)
def test_every_name_can_be_shown(name, text):
    assert shown(name) == text and shown(shown(name)) == text
    assert is_text(shown(name)) and "\n" not in shown(name)
    assert is_text(name) == (LATIN not in str(name) and "\ud800" not in str(name))


# ------------------------------------------------------------------------------------------------------------
# JSON


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


def recode(path: Path, encoding: str) -> None:
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_in_any_encoding(tmp_path, encoding):
    path = tmp_path / "values.json"
    path.write_bytes('{"1": "foie – 肝臓", "2": [1, 2.5, null, "\\ud83d\\udc1f"]}\r\n'.encode(encoding))
    expected = {"1": "foie – 肝臓", "2": [1, 2.5, None, "🐟"]}
    assert read_json(path) == reading.read_json(path) == expected
    assert read_text(path).startswith('{"1"')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"values\.json is not valid JSON \(.*\); write it again"),
        (b'{"a": 1', r"values\.json is not valid JSON \(.*\); write it again"),
        (b'{"a": "caf\xe9"}', r"values\.json is truncated or damaged \(.*\); write it again"),
        (b'\xff\xfe{\0"', r"values\.json is truncated or damaged"),
        (
            b'{"a": "caf\\udce9"}',
            r"values\.json is not valid JSON \(half a character in it\); write it again",
        ),
        (b'{"caf\\uDCE9": 1}', r"values\.json is not valid JSON \(half a character in it\)"),
        (b'"\xed\xb3\xa9"', r"values\.json is truncated or damaged"),
        (b"[" * 100_000, r"values\.json is not valid JSON"),
    ],
)
def test_json_that_is_none(tmp_path, content, message):
    path = tmp_path / "values.json"
    path.write_bytes(content)
    for read in (read_json, lambda path: read_json(path, remedy="write it again", unique_keys=True)):
        with pytest.raises(InputError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"values\.json is (not|truncated).* copy it from the release again"):
        reading.read_json(path)


def test_json_that_is_missing_or_repeats_itself(tmp_path):
    path = tmp_path / "values.json"
    with pytest.raises(InputError, match=r"values\.json is missing; do this"):
        read_json(path, remedy="do this")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path)
    path.write_text('{"a": {"b": 1, "c": 2, "b": 3}}')
    assert read_json(path) == {"a": {"b": 3, "c": 2}}
    with pytest.raises(InputError, match="the key 'b' occurs twice"):
        read_json(path, unique_keys=True)
    path.write_text("[NaN, -Infinity]")
    assert math.isnan(read_json(path)[0]) and read_json(path)[1] == -math.inf


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_in_any_encoding(targets, encoding):
    config = DatasetConfig(Kind.SEGMENTATION, str(targets))
    expected = read_dataset(config)
    recode(targets / "train.json", encoding)
    assert read_dataset(config) == expected
    assert not validate(ValidateOptions(targets)).problems


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tokenizers_in_any_encoding(tmp_path, encoding):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MICRO / name, tmp_path)
        recode(tmp_path / name, encoding)
    text = "<|user|>\nfetal [SEG] é"
    assert Tokenizer.from_folder(tmp_path).encode(text) == Tokenizer.from_folder(MICRO).encode(text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_checkpoints_in_any_encoding(tmp_path, encoding):
    for name in ("config.json", "manifest.json"):
        shutil.copy(TINY / name, tmp_path)
        recode(tmp_path / name, encoding)
    assert checkpoint.read_config(tmp_path) == checkpoint.read_config(TINY)
    assert checkpoint.read_manifest(tmp_path) == checkpoint.read_manifest(TINY)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_label_names_in_any_encoding(tmp_path, encoding):
    """As PowerShell writes what the guide says: echo '{"1": "liver"}' > names.json."""
    nibabel = pytest.importorskip("nibabel")
    values = np.zeros((8, 8, 3), np.uint8)
    values[2:5, 2:5, 1] = 1
    for folder in ("ct", "seg"):
        (tmp_path / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / folder / "a.nii.gz")
    (tmp_path / "names.json").write_bytes('{"1": "liver"}\r\n'.encode(encoding))
    options = BuildOptions(
        tmp_path / "out", "CT", "abdomen", volumes=tmp_path / "ct", labels=tmp_path / "seg",
        label_names=tmp_path / "names.json",
    )  # fmt: skip
    assert build(options).targets == {"liver": 1}
    shutil.rmtree(options.out)
    (tmp_path / "names.json").write_text('{"1": "liver", "1": "spleen"}')
    with pytest.raises(InputError, match=r"names\.json is not valid JSON \(the key '1' occurs twice in it\)"):
        build(options)


# ------------------------------------------------------------------------------------------------------------
# Names that are no text


def images_and_masks(root: Path, stem: str, target: str = "kidney") -> BuildOptions:
    save_picture(root / "scans" / f"{stem}.png")
    save_square(root / "masks" / f"{stem}_{target}.png")
    options = BuildOptions(
        root / "out", "MRI", "abdomen", root / "scans", root / "masks", fractions=(1, 0, 0)
    )
    return options


def test_the_record_of_an_image_of_such_a_name_can_be_written(any_name):
    path = any_name / f"{LATIN}.png"
    save_picture(path)
    _, record = open_image(path)
    assert record.source == rf"{any_name}/caf\xe9.png"
    json.dumps(vars(record), ensure_ascii=False).encode()
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"caf\\xe9\.png is not an image"):
        open_image(path)


def test_building_names_the_file_in_one_line(any_name, monkeypatch, capsys):
    options = images_and_masks(any_name, "a")
    images_and_masks(any_name, LATIN)
    arguments = ["data", "build", "--out", str(options.out), "--modality", "MRI", "--site", "abdomen"]
    arguments += ["--images", str(options.images), "--masks", str(options.masks)]
    monkeypatch.setattr(sys, "argv", ["unibiomed", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and not options.out.exists()
    expected = rf"Error: The name of {options.images}/caf\xe9.png is no UTF-8 text; rename the file."
    assert capsys.readouterr().err.replace("\n", "") == expected
    for path in options.images.glob("caf*"):
        path.rename(options.images / f"{LATIN}.txt")
    for path in options.masks.glob("caf*"):
        path.unlink()
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert r"scans/caf\xe9.txt is nothing that this command reads" in capsys.readouterr().out


def test_a_dataset_in_a_folder_of_such_a_name_is_made_checked_and_read(any_name, byte_tokenizer):
    root = any_name / LATIN
    options = images_and_masks(root, "a")
    build(options)
    report = validate(ValidateOptions(options.out))
    assert not report.problems
    (options.out / "train_mask" / "a_kidney.png").unlink()
    problems = validate(ValidateOptions(options.out)).problems
    assert problems and all(r"caf\xe9/out/train_mask/a_kidney.png is missing" in p.text for p in problems)
    save_square(options.out / "train_mask" / "a_kidney.png")
    options.out.rename(root / LATIN)
    datasets = find_datasets(root / LATIN, balance_to=0)
    assert datasets[0].title == r"caf\xe9/segmentation"
    pipeline = Pipeline(PipelineConfig(datasets, SMALL, batch_size=1), SIZES, byte_tokenizer)
    assert pipeline.read(0).names[0].startswith(r"caf\xe9/")


def test_tables_that_name_such_files_are_refused(any_name):
    write_table(any_name / "train.json", coco_table(1) | {"images": [{"file_name": f"{LATIN}.png"}]})
    assert "\\udce9" in (any_name / "train.json").read_text()
    message = r"train\.json is not valid JSON \(half a character in it\)"
    with pytest.raises(InputError, match=message):
        read_dataset(DatasetConfig(Kind.SEGMENTATION, str(any_name)))
    (problem,) = validate(ValidateOptions(any_name)).problems
    assert problem.sort == "schema" and "half a character" in problem.text


def test_words_that_are_no_text(tmp_path, byte_tokenizer):
    with pytest.raises(InputError, match=r"The text 'f\\xe9tus' is no valid text; write it in Unicode"):
        byte_tokenizer.encode("f\udce9tus")
    for wrong in (None, 5, b"fetus"):
        with pytest.raises(InputError, match="The text is a .*; give words as a str"):
            byte_tokenizer.encode(wrong)
        with pytest.raises(InputError, match="The prompt is a "):
            build_prompt(wrong)
    with pytest.raises(InputError, match=r"The prompt '<image>\\nf\\xe9tus' is no valid text"):
        build_prompt("<image>\nf\udce9tus", image=True)
    with pytest.raises(InputError, match="past_text .* is no valid text"):
        build_prompt("And now?", past_text="f\udce9tus")
    options = images_and_masks(tmp_path, "a")
    for field in ("modality", "site"):
        with pytest.raises(InputError, match=rf"{field} 'f\\xe9' is no valid text"):
            build(BuildOptions(**{**vars(options), field: "f\udce9"}))


# ------------------------------------------------------------------------------------------------------------
# Two spellings of one name


def test_images_masks_and_findings_in_two_spellings(any_name):
    """A mask from a Mac, of an image from elsewhere."""
    options = images_and_masks(any_name, "a")
    save_picture(any_name / "scans" / f"P{COMPOSED}.png")
    save_square(any_name / "masks" / f"P{APART}_caf{APART}.png")
    save_picture(any_name / "scans" / f"Q{APART}.png")
    save_square(any_name / "masks" / f"Q{COMPOSED}_caf{COMPOSED}.png")
    report = build(BuildOptions(**{**vars(options), "findings": (f"caf{APART}",)}))
    assert report.targets == {"kidney": 1, f"caf{COMPOSED}": 2} and not report.without_masks
    table = json.loads((options.out / "train_disease.json").read_text(encoding="utf-8"))
    names = {row["file_name"] for row in table["annotations"]}
    assert names == {f"P{COMPOSED}.png", f"Q{COMPOSED}.png"}
    assert not validate(ValidateOptions(options.out)).problems
    save_square(any_name / "masks" / f"P{COMPOSED}_caf{COMPOSED}.png")
    again = BuildOptions(**{**vars(options), "out": any_name / "again"})
    with pytest.raises(InputError, match="are masks of one target; merge them"):
        build(again)
    save_picture(any_name / "scans" / f"P{APART}.png")
    with pytest.raises(InputError, match="have one name; rename one of them"):
        build(again)


def test_tables_whose_files_are_spelled_otherwise(any_name, byte_tokenizer):
    """Tables typed here, files unpacked from there."""
    root = any_name / "data"
    folder = root / f"{APART}t{APART}"
    save_picture(folder / f"P{APART}.png")
    save_square(root / "masks" / f"P{APART}_liver.png")
    image, mask = f"{COMPOSED}t{COMPOSED}/P{COMPOSED}.png", f"masks/P{COMPOSED}_liver.png"
    table = {
        "images": [{"file_name": image, "width": 60, "height": 30}],
        "annotations": [
            {"file_name": spelling, "mask_file": mask, "sentences": [{"raw": "liver in CT"}]}
            for spelling in (image, unicodedata.normalize("NFD", image))
        ],
    }
    write_table(root / "train.json", table)
    volumes = {
        spelling: {
            "slices": [f"P{slice_spelling}.png"],
            "expressions": {"0": {"exp": "liver", "mask_file": [file]}},
        }
        for spelling, slice_spelling, file in (
            (f"{COMPOSED}t{COMPOSED}", APART, mask),
            (f"{APART}t{APART}", COMPOSED, unicodedata.normalize("NFD", mask)),
        )
    }
    write_table(root / "meta_train.json", {"volumes": volumes})
    datasets = find_datasets(root, balance_to=0)
    records = [record for config in datasets for record in read_dataset(config)]
    assert {record.kind for record in records} == {Kind.SEGMENTATION, Kind.SEQUENCE}
    assert len(records) == 4
    for record in records:
        assert record.images == (str(folder / f"P{APART}.png"),)
        assert record.masks == ((str(root / "masks" / f"P{APART}_liver.png"),),)
    check_files(records)
    assert {problem.sort for problem in validate(ValidateOptions(root)).problems} <= {"duplicate"}


def test_a_file_is_found_by_either_spelling(any_name, monkeypatch):
    here = any_name / APART
    here.mkdir()
    (here / f"{COMPOSED}.txt").write_text("")
    found = str(here / f"{COMPOSED}.txt")
    for folder in (COMPOSED, APART):
        for name in (COMPOSED, APART):
            assert find_file(any_name / folder / f"{name}.txt") == found
    for missing in (any_name / COMPOSED / "no.txt", any_name / COMPOSED / f"no{APART}.txt", any_name / "no"):
        assert find_file(missing) == str(missing)
    (here / f"new{APART}").write_text("")  # the folder has changed
    assert find_file(here / f"new{COMPOSED}") == str(here / f"new{APART}")
    monkeypatch.chdir(here)
    assert find_file(f"{APART}.txt") == f"{COMPOSED}.txt"
    assert find_file("nothing.txt") == "nothing.txt" and find_file(f"no{APART}") == f"no{APART}"
    assert spelled(APART) == COMPOSED and spelled("plain") == "plain"


def test_two_files_of_one_spelling_are_not_guessed_between(any_name):
    letters = "e\u0301\u0323", "\u1eb9\u0301"  # two ways to write one letter, neither of them composed
    for name in letters:
        (any_name / name).write_text("")
    assert len({spelled(name) for name in letters}) == 1
    other = "e\u0323\u0301"
    assert spelled(other) == spelled(letters[0]) and find_file(any_name / other) == str(any_name / other)


def test_volumes_and_labels_in_two_spellings(any_name):
    nibabel = pytest.importorskip("nibabel")
    values = np.zeros((8, 8, 3), np.uint8)
    values[2:5, 2:5, 1], values[6, 6, 2] = 1, 2
    for folder, name in (("ct", f"P{COMPOSED}"), ("seg", f"P{APART}")):
        (any_name / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), any_name / folder / f"{name}.nii.gz")
    names = {"1": f"art{APART}re", "2": f"art{COMPOSED}re"}
    (any_name / "names.json").write_text(json.dumps(names))
    options = BuildOptions(
        any_name / "out", "CT", "abdomen", volumes=any_name / "ct", labels=any_name / "seg",
        label_names=any_name / "names.json", fractions=(1, 0, 0),
    )  # fmt: skip
    assert build(options).targets == {f"art{COMPOSED}re": 2}
    assert not validate(ValidateOptions(options.out)).problems
    assert (options.out / f"P{COMPOSED}").is_dir()


def test_images_from_open_files_have_names_that_can_be_written(any_name):
    path = any_name / f"{LATIN}.png"
    save_picture(path)
    with path.open("rb") as file:
        assert open_image(file)[1].source == rf"{any_name}/caf\xe9.png"
    buffer = io.BytesIO()
    Image.new("L", (2, 2)).save(buffer, "PNG")
    assert open_image(buffer)[1].source == "open file"
