"""The page of a study: everything in one file, nothing loaded, nothing of it taken for markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from unibiomed_jax import StudyAnswer, open_study, write_study
from unibiomed_jax.config.preprocessing import PREPROCESSING
from unibiomed_jax.inference.study_answer import Conditioning, StudySegment
from unibiomed_jax.studies.measures import measure
from unibiomed_jax.studies.views import find_view
from unibiomed_jax.studies.windows import Window

nibabel = pytest.importorskip("nibabel")

WINDOW = Window(0, 2000, "stated")
EVIL = '<img src="https://a.example/x" onerror="alert(1)"> & \'</script><!--'


class _Page(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, tag

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Axes run to the right, the front and the head; pixels are twice as tall as wide."""
    voxels = np.random.default_rng(0).integers(0, 2000, (9, 6, 5)).astype(np.int16)
    path = tmp_path_factory.mktemp("page") / "a.nii"
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.0, 2.0, 5.0, 1.0])), path)
    return open_study(path, modality="MR")


def _masks(study, *phrases) -> dict[str, np.ndarray]:
    masks = {phrase: np.zeros(study.values.shape, bool) for phrase in phrases}
    for number, mask in enumerate(list(masks.values())[:-1]):  # the last one is empty
        mask[1 + number : 3 + number, 1:4, 2:7] = True
        mask[1 + number, 2, 3] = False  # a hole
    return masks


def _answer(study, masks, text: str) -> StudyAnswer:
    scores = tuple(0.9 if index == 1 else 0.5 if index == 2 else None for index in range(5))
    return StudyAnswer(
        prompt=f"<image>What is there? {EVIL}",
        text=text,
        segments=tuple(
            StudySegment(phrase, mask, scores, scores, measure(study, mask)) for phrase, mask in masks.items()
        ),
        conditioning=Conditioning("auto", (1, 3), f"best {EVIL}"),
        window=WINDOW,
        view=find_view(study, PREPROCESSING["released"]),
        preprocessing=PREPROCESSING["released"],
        cleaning=("kept the largest part",),
        notes=("a note",),
        checkpoint_hash="c0ffee" * 10,
        study_hash="dada" * 16,
        request={"ask": EVIL},
        seconds={"vision": 1.0},
    )


def test_the_page_says_what_was_answered_and_shows_each_mask_on_its_slices(study, tmp_path):
    masks = _masks(study, "liver", EVIL, "spleen")
    answer = _answer(
        study, masks, f"A <p> liver </p> [SEG], <p> {EVIL} </p> [SEG]. [SEG] spleen. liver [SEG]"
    )
    write_study(study, answer, tmp_path / "out", ["html"])
    text = (tmp_path / "out" / "study.html").read_text()
    page = _Page(text)
    # All that a browser runs or loads is in the file, and it may run and load nothing else.
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv"))
    data, script = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"'sha256-{digest}'" in policy
    assert {tag for tag, _ in page.elements} & {"img", "link", "iframe", "form", "a"} == set()
    for _, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on")} | ({"src"} & set(attributes))
        assert attributes.get("href", "data:image/jpeg").startswith("data:image/jpeg")
    assert not re.search(r"url\(|@import", "".join(page.texts["style"]))

    data = json.loads(data)
    assert [region["phrase"] for region in data["regions"]] == ["liver", EVIL, "spleen"]
    assert [sorted(map(int, region["paths"])) for region in data["regions"]] == [[1, 2], [2, 3], []]
    pictures = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in data["slices"]]
    assert [picture.size for picture in pictures] == [(9, 6)] * 5
    # Upright: the patient's right is at the left and the front at the top, which turns this grid around.
    grey = np.asarray(pictures[3], float)
    np.testing.assert_allclose(grey, study.values[3, ::-1, ::-1] / 2000 * 255, atol=60)
    assert np.corrcoef(grey.ravel(), study.values[3, ::-1, ::-1].ravel())[0, 1] > 0.95
    # Row 1 to 3 of columns 2 to 6, turned around, and the hole.
    assert data["regions"][0]["paths"]["2"] in ("M2 2h5v3h-5z", "M2 2v3h5v-3z")
    assert data["regions"][0]["paths"]["1"].count("z") == 2
    (svg,) = (a for tag, a in page.elements if tag == "svg" and a.get("class") != "strip")
    assert svg["viewbox"] == "0 0 9 12"  # pixels at their size
    assert "".join(page.texts["span"]) == "ALPR"

    # Words: each phrase is a button of its colour where it stands; the last [SEG] has no mask.
    buttons = [a for tag, a in page.elements if tag == "button" and a.get("class", "").startswith("phrase")]
    assert [a["data-region"] for a in buttons] == ["0", "1", "2", "0", "1", "2"]
    assert (
        len({a["style"] for a in buttons}) == 3 and [a["class"] for a in buttons].count("phrase empty") == 2
    )
    words = re.sub(r"<[^>]+>", "", re.search(r'<p class="answer">(.*?)</p>', text, re.S)[1])
    assert words.startswith("A liver, &lt;img") and words.endswith(". spleen. liver")
    for part in (
        "0 to 2000 (stated)", "axial", "0.70", "c0ffee" * 10, "dada" * 16, "2 to 3", "slices 2, 4 (auto)",
        "kept the largest part", "a note", "5 slices of 6 x 9 pixels", "unibiomed-jax", answer.notice,
    ):  # fmt: skip
        assert part in text, part
    volume = 29 * 10 / 1000
    assert f"<td>{volume:.4g}</td>" in text
    record = json.loads((tmp_path / "out" / "answer.json").read_text())
    assert record["masks"][0]["predicted_iou"] == [None, 0.9, 0.5, None, None]
    assert record["text"] == answer.text and record["request"] == {"ask": EVIL}


@pytest.mark.parametrize(
    "text", ["The liver [SEG].", "Nothing.", "Spleen [SEG], liver [SEG] [SEG] [SEG] [SEG]"]
)
def test_slices_that_name_different_things_are_all_shown(study, tmp_path, text):
    """Asked one by one the text is that of a slice, the masks are those of all."""
    masks = _masks(study, "liver", "spleen", "kidney")
    answer = dataclasses.replace(
        _answer(study, masks, text), conditioning=Conditioning("each", tuple(range(5)), "one by one")
    )
    write_study(study, answer, tmp_path / "out", ["html"])
    page = (tmp_path / "out" / "study.html").read_text()
    words = re.search(r'<p class="answer">(.*?)</p>', page, re.S)[1]
    assert sorted(re.findall(r'data-region="(\d)"', words)) == ["0", "1", "2"]
    expected = {
        "T": "The liver. spleen kidney",
        "N": "Nothing. liver spleen kidney",
        "S": "Spleen, liver kidney",
    }
    assert re.sub(r"<[^>]+>", "", words) == expected[text[0]]


def test_plain_masks_and_single_pictures_in_colour_have_a_page_too(study, tmp_path):
    write_study(study, _masks(study, EVIL, "none"), tmp_path / "out", ["html"], window=WINDOW)
    page = _Page((tmp_path / "out" / "study.html").read_text())
    assert page.texts["h1"] == [f"Masks of {study.series_alias}"]
    Image.new("RGB", (2500, 50), "red").save(tmp_path / "a.png")
    picture = open_study(tmp_path / "a.png")
    mask = np.zeros((1, 50, 2500), bool)
    mask[0, 10:20, 30:50] = True
    write_study(picture, {"red": mask}, tmp_path / "picture", ["html"])
    page = _Page((tmp_path / "picture" / "study.html").read_text())
    data = json.loads(page.texts["script"][0])
    (picture,) = (Image.open(io.BytesIO(base64.b64decode(slice_))) for slice_ in data["slices"])
    assert picture.size == (2048, 41) and picture.mode == "RGB"
    assert data["regions"][0]["paths"]["0"] == "M30 10h20v10h-20z"
    assert "input" not in {tag for tag, _ in page.elements}
    words = " ".join(text for texts in page.texts.values() for text in texts)
    assert "1 slice of 50 x 2500" in words and "Scroll" not in words, "there is nothing to scroll"
    write_study(study, {}, tmp_path / "nothing", ["html", "coco"], window=WINDOW)
    text = (tmp_path / "nothing" / "study.html").read_text()
    (toggle,) = (found for _, found in _Page(text).elements if found.get("class") == "toggle")
    assert "There are no masks." in text and "Scroll by wheel" in text and "hidden" in toggle


def test_low_values_are_white_in_every_picture_where_they_are_meant_to_be(tmp_path):
    pytest.importorskip("highdicom")
    import pydicom
    from dicom_series import MadeSeries

    series = MadeSeries(attributes={"PhotometricInterpretation": "MONOCHROME1"})
    study = open_study(series.write(tmp_path / "in"))
    mask = np.zeros(study.values.shape, bool)
    mask[2, 4, 5] = True
    window = Window(-1024, 1000, "stated")
    write_study(study, {"x": mask}, tmp_path / "out", ["html", "png", "sc"], window=window)
    page = _Page((tmp_path / "out" / "study.html").read_text())
    slices = json.loads(page.texts["script"][0])["slices"]
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(slices[2]))),
        Image.open(tmp_path / "out" / "overlay_0003.png"),
        Image.fromarray(pydicom.dcmread(tmp_path / "out" / "overlay_0003.dcm").pixel_array),
    ]
    for picture in pictures:
        # Under the pictures with a legend lie rows of another kind.
        whole = picture.convert("L").crop((0, 0, picture.width, picture.width * 20 // 16))
        whole = whole.crop((0, 0, whole.width, min(whole.height, picture.height)))
        shown = np.asarray(whole.resize((16, 20), Image.Resampling.BOX), float)
        assert np.corrcoef(shown.ravel(), study.values[2].ravel())[0, 1] < -0.9


def test_coco_is_read_by_its_own_tools(study, tmp_path, capsys):
    from pycocotools.coco import COCO

    masks = _masks(study, "liver", "tumor", "spleen")
    write_study(study, masks, tmp_path / "out", ["coco"])
    dataset = COCO(str(tmp_path / "out" / "masks_coco.json"))
    back = {phrase: np.zeros(study.values.shape, bool) for phrase in masks}
    for annotation in dataset.loadAnns(dataset.getAnnIds()):
        name = dataset.loadCats(annotation["category_id"])[0]["name"]
        mask = dataset.annToMask(annotation)
        back[name][annotation["image_id"] - 1] = mask
        rows, columns = np.nonzero(mask)
        assert annotation["bbox"] == [
            columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
        ]  # fmt: skip
        assert annotation["area"] == mask.sum()
    for phrase, mask in masks.items():
        np.testing.assert_array_equal(back[phrase], mask)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_shows_the_slice_with_most_of_the_masks(study, tmp_path):
    write_study(study, _masks(study, "liver", "tumor", "none"), tmp_path / "out", ["html"], window=WINDOW)
    run = subprocess.run(
        [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(tmp_path / "out" / "study.html"),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    page = _Page(run.stdout.strip())
    assert [words for words in page.texts["strong"]] == ["Slice 3 of 5"]
    (slider,) = (a for tag, a in page.elements if tag == "input")
    assert slider["aria-valuetext"] == "Slice 3 of 5"  # which only the script says
    assert len([a for tag, a in page.elements if tag == "path"]) == 2
