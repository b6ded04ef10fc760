"""`unibiomed study`, as a user runs it."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from places import MICRO, ROOT, TESTS
from powerless import files_end_at, without_override
from rich.console import Console
from talking import dictate

from unibiomed_jax import InputError, UniBiomed, open_study
from unibiomed_jax.commands.run import run
from unibiomed_jax.commands.study import StudyOptions, _usual_formats, study

pydicom = pytest.importorskip("pydicom")

from dicom_series import PLANTED, MadeSeries, save  # noqa: E402
from pydicom.data import get_testdata_file  # noqa: E402


def test_the_list_names_series_by_alias_and_says_what_is_odd(unibiomed, tmp_path):
    folder = MadeSeries(attributes={"BodyPartExamined": "CHEST"}).write(tmp_path / "Plantedname_A", skip=(2,))
    save(MadeSeries(attributes={"ImageType": ["LOCALIZER"]}).slice(0), folder / "scout")
    shutil.copy(get_testdata_file("rtdose.dcm"), folder)
    run = unibiomed("study", str(folder), "--list")
    assert run.returncode == 1, run.stderr  # the localizer cannot be opened
    line = next(line for line in run.stdout.splitlines() if "uneven" in line)
    for part in ("CT", "axial", "20 x 16", "2.5 x 0.9 x 0.7", "lung", "5.00 mm instead of 2.50 mm"):
        assert part in line
    assert "nothing but localizers" in run.stdout and "RT dose" in run.stdout
    assert "2 series; 1 files left out." in run.stdout
    assert not any(word in run.stdout + run.stderr for word in PLANTED)
    run = unibiomed("study", str(tmp_path / "Plantedname_B"), "--list")
    assert run.returncode == 2 and "check it" in run.stderr and "Planted" not in run.stderr
    run = unibiomed("study", str(folder))
    assert run.returncode == 2 and "either --list" in run.stderr and "Traceback" not in run.stderr


def test_the_list_says_once_what_is_to_be_stated_and_what_was_cut_off(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("unibiomed_jax.commands.study.console", Console(width=150))
    nibabel = pytest.importorskip("nibabel")
    folder = MadeSeries(shape=(2, 20, 16)).write(tmp_path / "in")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 2), np.int16), np.eye(4)), folder / "scan.nii")
    start = Path(get_testdata_file("CT_small.dcm")).read_bytes()[:3000]  # before it says how large it is
    (folder / "cut.dcm").write_bytes(start)

    def listed(**options) -> str:
        assert run(lambda: study(StudyOptions(folder, list=True, **options))) == 1
        return " ".join(capsys.readouterr().out.split())

    said = listed()
    assert said.count("--window with one of abdomen, lung, pelvis, liver, colon, pancreas, own") == 1
    assert "ends before its pixels; copy it again from the archive" in said
    assert said.count("│ to be stated │") == 2 and "percentiles" not in said
    assert listed(modality="MR").count("percentiles") == 1, "what does not say it is as stated"
    monkeypatch.setattr("unibiomed_jax.commands.study.console", Console(width=80))
    assert "…" not in listed(modality="MR"), "nothing is cut on a narrow terminal"
    assert run(lambda: study(StudyOptions(folder, list=True, modality="mr"))) == 2
    assert "'mr' is no modality; give one of DICOM's codes: BI, CR" in capsys.readouterr().err
    alone = run(lambda: study(StudyOptions(folder / "cut.dcm", list=True)))
    assert alone == 2 and "No series lies there" in capsys.readouterr().err


@pytest.fixture(scope="module")
def talking():
    """Loaded once."""
    return dictate(UniBiomed.from_pretrained(MICRO))


@pytest.fixture
def ask(talking, monkeypatch):
    """Runs the command in this process; its exit code."""
    monkeypatch.setattr(UniBiomed, "from_pretrained", lambda *args, **options: talking)

    def command(path, out, **changes) -> int:
        options = {"ask": "Please segment it.", "checkpoint": MICRO, "out": out, "max_new_tokens": 8}
        options |= {"conditioning": ("2",), "window": ("-160", "240")} | changes
        return run(lambda: study(StudyOptions(path, **options)))

    return command


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_one_question_to_all_series_of_a_folder(ask, tmp_path, capsys):
    """Several are chosen; what is damaged or refused does not stop the others; again nothing is done."""
    folder, out = tmp_path / "Plantedname", tmp_path / "out"
    made = MadeSeries(shape=(3, 20, 16))
    made.write(folder / "a")
    uneven = MadeSeries(shape=(4, 20, 16)).write(folder / "b", skip=(2,))
    save(MadeSeries(attributes={"ImageType": ["LOCALIZER"]}).slice(0), folder / "scout")
    assert ask(folder, out) == 2
    refused = capsys.readouterr().err
    assert "1: series-" in refused and "choose one with series= (--series)" in refused and not out.exists()

    (folder / "broken.dcm").write_bytes((uneven / "IM00001").read_bytes()[:200])
    assert ask(folder, out, series=("all",), formats=("seg", "png")) == 1
    said = capsys.readouterr()
    assert "2 of 3 series answered; peak memory" in said.out and "nothing but localizers" in said.err
    assert "ends before it says what it is" in said.out and "1 files left out" in said.out
    answers = sorted(out.glob("*/answer.json"))
    records = [json.loads(path.read_text()) for path in answers]
    assert [len(list(path.parent.glob("seg.dcm"))) for path in answers] == [1, 1]
    assert sorted(record["shape"] for record in records) == [[3, 20, 16], [3, 20, 16]]
    for record in records:
        assert record["conditioning"]["slices"] == [2] and record["conditioning"]["choice"] == "stated"
        assert record["window"] == {"low": -160.0, "high": 240.0, "from": "stated"}
        assert record["preprocessing"]["ct_orientation"] == "ras_voxel" and record["notice"]
        (mask,) = record["masks"]
        assert mask["pixels"] > 0 and mask["diameter_mm"] > 0 and len(mask["object_score"]) == 3
        assert (mask["volume_ml"] is None) == any("uneven" in note for note in record["notes"])
    everything = b"".join(contents(out).values()) + str(sorted(contents(out))).encode()
    kept = b"".join(path.read_bytes() for path in out.rglob("*.dcm"))  # which must name whom they belong to
    for word in (*PLANTED, str(tmp_path)):
        assert word not in said.out + said.err
        assert everything.count(word.encode()) == kept.count(word.encode()), word

    before = contents(out)
    assert ask(folder, out, series=("all",), formats=("seg", "png")) == 1
    assert capsys.readouterr().out.count("is answered already") == 2 and contents(out) == before
    together = tmp_path / "together"
    beside = MadeSeries(shape=(1, 20, 16))
    beside.study = made.study
    beside.write(tmp_path / "pair" / "b")
    shutil.copytree(folder / "a", tmp_path / "pair" / "a")
    ask(tmp_path / "pair", together, series=("all",), formats=("seg",), deidentify=True, conditioning=("1",))
    pair = [pydicom.dcmread(path) for path in together.glob("*/seg.dcm")]
    assert len(pair) == 2 and len({(o.PatientID, o.StudyInstanceUID) for o in pair}) == 1
    (first,) = (series.parent.name for series in answers if json.loads(series.read_text())["notes"] == [])
    assert ask(folder, out / first, series=(first,), formats=("seg",), deidentify=True) == 1
    everything = b"".join(contents(out / first).values())
    assert not any(word.encode() in everything for word in PLANTED) and b"No conformance" in everything
    assert {path.name for path in tmp_path.iterdir()} == {"Plantedname", "out", "pair", "together"}


@pytest.mark.slow
def test_a_volume_comes_back_on_its_grid_and_other_requests_replace_the_answer(ask, tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    values = np.random.default_rng(0).integers(-200, 300, (16, 20, 3)).astype(np.int16)
    affine = np.array([[0.7, 0.09, 0, -9], [-0.07, 0.9, 0, 4], [0, 0, 3, 60], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "scan.nii.gz")
    out = tmp_path / "out"
    assert ask(tmp_path / "scan.nii.gz", out, window=()) == 1
    assert "state its modality" in capsys.readouterr().err and not out.exists()
    assert ask(tmp_path / "scan.nii.gz", out, modality="CT", window=("liver",)) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "answer.json", "mask_1_it.nii.gz", "study.html",
    ]  # fmt: skip
    mask, source = nibabel.load(out / "mask_1_it.nii.gz"), nibabel.load(tmp_path / "scan.nii.gz")
    assert np.array_equal(mask.affine, source.affine) and mask.shape == source.shape
    said = capsys.readouterr().out
    assert "-25 to 230 (preset liver)" in said and "named the site: 'abdomen CT'" in said
    assert ask(tmp_path / "scan.nii.gz", out, modality="CT", window=("lung",), formats=("html",)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["answer.json", "study.html"]
    assert json.loads((out / "answer.json").read_text())["window"]["low"] == -1000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"out": None}, "--ask needs --out"),
        ({"checkpoint": None}, "--ask needs --checkpoint"),
        ({"list": True}, "either --list"),
        ({"window": ("1", "2", "3")}, "--window 1 2 3 is no window; give a name"),
        ({"window": ("low", "high")}, "is no window"),
        ({"conditioning": ("0",)}, "--conditioning 0 is impossible; give auto"),
        ({"conditioning": ("first", "3")}, "is impossible"),
        ({"conditioning": ("2", "1", "02")}, "--conditioning 2 1 02 names a slice twice"),
        ({"formats": ("stl",)}, "--formats stl is none; choose of nifti"),
        ({"parts": 0}, "--parts 0 must be at least 1"),
        ({"series": ("7",)}, "There is no series '7'"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(ask, tmp_path, capsys, options, sentence):
    folder = MadeSeries(shape=(2, 8, 8)).write(tmp_path / "in")
    options = {"out": tmp_path / "out"} | options
    assert ask(folder, **options) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize("slices", [1, 3])
def test_slices_beyond_the_last_are_refused_as_they_are_counted(ask, tmp_path, capsys, slices):
    folder = MadeSeries(shape=(slices, 20, 16)).write(tmp_path / "in")
    assert ask(folder, tmp_path / "out", conditioning=("1", str(slices + 1))) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"--conditioning {slices + 1} is no slice" in error and f"from 1 to {slices}." in error


def test_something_else_is_never_replaced(ask, tmp_path, capsys):
    folder = MadeSeries(shape=(2, 8, 8)).write(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert ask(folder, tmp_path / "out") == 2
    assert "holds something else than an answer" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_what_may_not_be_written_or_read_is_said_before_anything_is_asked(ask, talking, tmp_path, capsys):
    """Permissions, a file in the way, and a folder for temporary files that is full or locked."""
    folder, locked = MadeSeries(shape=(3, 20, 16)).write(tmp_path / "in"), tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for out in (locked / "out", locked / "deep" / "out", folder / "IM00001" / "out"):
        with without_override():
            assert ask(folder, out) == 2
        error = capsys.readouterr().err
        assert "Nothing can be written into" in error and "choose another --out" in error
        assert error.count("\n") == 1 and not list(locked.iterdir())
    with without_override(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(locked))
        assert ask(folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "(Permission denied); set TMPDIR to another" in error and error.count("\n") == 1
    (folder / "IM00001").chmod(0)
    with without_override():
        listed = run(lambda: study(StudyOptions(folder, list=True)))
    said = capsys.readouterr()
    assert listed == 1 and "cannot be read (Permission denied); change its permissions" in said.out
    assert "1 files left out" in said.out and not said.err


@pytest.mark.slow
def test_on_a_full_disk_nothing_done_is_lost(ask, talking, tmp_path, capsys, monkeypatch):
    """The page does not fit: the answer that lay there stays, and what was computed is not computed again."""
    folder, out = MadeSeries(shape=(3, 20, 16)).write(tmp_path / "in"), tmp_path / "out"
    assert ask(folder, out, formats=("coco",)) == 0
    before = contents(out)
    with files_end_at(10_000):
        assert ask(folder, out, conditioning=("3",), formats=("html",)) == 2
    error = capsys.readouterr().err
    assert "is full; free some space and run" in error and error.count("\n") == 1
    assert contents(out) == before
    monkeypatch.setattr(talking, "say", lambda *_, **__: pytest.fail("the words were said again"))
    assert ask(folder, out, conditioning=("3",), formats=("html",)) == 0
    assert {path.name for path in out.iterdir()} == {"answer.json", "study.html"}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.slow
def test_an_answer_is_that_of_the_patient_named_now(ask, tmp_path, capsys):
    """The same pixels under a corrected identity, sent again, or with a file gone, are answered again."""
    folder, out = tmp_path / "in", tmp_path / "out"
    formats = ("seg", "rtstruct", "sc")
    made = MadeSeries(shape=(1, 20, 16))
    options = {"formats": formats, "conditioning": ("auto",)}
    image = made.slice(0)
    save(image, folder / "a")
    assert ask(folder, out, **options) == 0
    for left in (".out.partial", ".out.partial-1"):  # by runs that were killed when all was written
        (tmp_path / left).mkdir()
    assert ask(folder, out, **options) == 0 and "answered already" in capsys.readouterr().out
    assert not list(tmp_path.glob(".out*"))
    tmp_path.chmod(0o555)  # nothing need be written
    with without_override():
        assert ask(folder, out, **options) == 0 and "answered already" in capsys.readouterr().out
    tmp_path.chmod(0o755)
    (out / "seg.dcm").unlink()
    assert ask(folder, out, **options) == 0 and "answered already" not in capsys.readouterr().out
    for name, value in (
        ("PatientID", "OTHER"), ("PatientName", "Müller"), ("StudyInstanceUID", "2.25.1"),
        ("SOPInstanceUID", "2.25.2"), ("FrameOfReferenceUID", "2.25.3"),
    ):  # fmt: skip
        image.SpecificCharacterSet = "ISO_IR 100"
        setattr(image, name, value)
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        save(image, folder / "a")
        assert ask(folder, out, **options) == 0
        assert "answered already" not in capsys.readouterr().out, name
        assert ask(folder, out, **options) == 0 and "answered already" in capsys.readouterr().out, name
    written = [pydicom.dcmread(path) for path in out.glob("*.dcm")]
    assert {str(found.PatientName) for found in written} == {"Müller"} and len(written) == 3
    assert {found.PatientID for found in written} == {"OTHER"}


def test_what_cannot_be_written_is_known_before_anything_is_asked(
    ask, talking, tmp_path, capsys, monkeypatch
):
    """Stated formats are refused; of the usual ones those are written that can be."""
    asked = []

    def ask_study(*arguments, **options):
        asked.append(arguments)
        raise InputError("It was asked.")

    monkeypatch.setattr(talking, "ask_study", ask_study)
    made = MadeSeries(shape=(2, 20, 16))
    images = [made.slice(index) for index in range(2)]
    for index, image in enumerate(images):
        del image.FrameOfReferenceUID
        save(image, tmp_path / "in" / str(index))
    for formats, sentence in (
        (("html", "seg"), "DICOM-SEG cannot be made"),
        (("rtstruct",), "RTSTRUCT desc"),
    ):
        assert ask(tmp_path / "in", tmp_path / "out", formats=formats) == 1
        assert sentence in capsys.readouterr().err and not asked
    assert ask(tmp_path / "in", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert len(asked) == 1 and "Left out: DICOM-SEG cannot be made" in said.out and "was asked" in said.err
    assert _usual_formats(open_study(tmp_path / "in")) == ("nifti", "html")
    assert _usual_formats(open_study(made.write(tmp_path / "whole"))) == ("nifti", "seg", "html")


@pytest.mark.scale
def test_a_command_that_is_killed_goes_on_and_nobody_sees_half_a_bundle(ask, talking, tmp_path, monkeypatch):
    """SIGKILL in the first pass, while slices are followed, and while the bundle is written."""
    seed = time.time_ns()
    draw = random.Random(seed)
    slices, formats = 5, ("nifti", "png", "coco", "html")
    folder = MadeSeries(shape=(slices, 20, 16)).write(tmp_path / "in")
    out, whole, state = tmp_path / "out", tmp_path / "whole", tmp_path / ".out.partial"
    options = {"conditioning": ("auto",), "batch_size": 1, "formats": formats}
    assert ask(folder, whole, **options) == 0
    expected = without_times(whole)
    command = [sys.executable, TESTS / "support" / "talking.py", "study", folder, "--out", out]
    command += ["--ask", "Please segment it.", "--checkpoint", MICRO, "--max-new-tokens", "8"]
    command += ["--window", "-160", "240", "--batch-size", "1", "--formats", *formats]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS / 'support'}"}
    for place, found in (
        (state, f"first_*{draw.randrange(slices)}.npz"),
        (state, f"slice_*{draw.randrange(slices)}.npz"),
        (tmp_path, ".out.partial-*"),
    ):
        with subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not any(place.glob(found)):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))
            process.kill()
        assert any(place.glob(found)) or out.exists(), (seed, found)
        assert not out.exists() or without_times(out) == expected, (seed, found)

    monkeypatch.setattr(talking, "predict_batch", lambda *_, **__: pytest.fail("all slices were asked"))
    assert ask(folder, out, **options) == 0
    assert without_times(out) == expected, seed
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "whole"}, seed


def without_times(folder) -> dict[str, bytes]:
    """All files of a bundle, but for how long things took."""
    files = contents(folder)
    record = json.loads(files["answer.json"])
    del record["seconds"]
    files["answer.json"] = json.dumps(record).encode()
    files["study.html"], found = re.subn(rb"<dd>\d+\.\d s</dd>", b"", files["study.html"])
    assert found == 1
    return files


@pytest.mark.slow
def test_the_present_folder_may_be_the_answer(ask, tmp_path, capsys, monkeypatch):
    """It has no name of its own in "."."""
    folder, out = MadeSeries(shape=(1, 20, 16)).write(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "answer.json").write_text("{}")
    monkeypatch.chdir(out)
    assert ask(folder, Path("."), formats=("coco",), conditioning=("1",)) == 0
    assert json.loads((out / "answer.json").read_text())["files"] == {"coco": ["masks_coco.json"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.slow
def test_inputs_as_they_come(ask, tmp_path, capsys, monkeypatch):
    """One slice is answered; time points are a choice; truncated pixels and a full disk are a sentence."""
    single = MadeSeries(shape=(1, 20, 16)).write(tmp_path / "single")
    assert ask(single, tmp_path / "a", formats=("seg",), conditioning=("auto",)) == 0
    record = json.loads((tmp_path / "a" / "answer.json").read_text())
    assert record["conditioning"]["choice"] == "each" and record["conditioning"]["slices"] == [1]
    said = capsys.readouterr().out
    assert "there is only one slice" in said and ", slice 1 of 1\n" in said
    assert ask(single, tmp_path / "a", formats=("seg", "coco"), conditioning=("1",), smallest_ml=1e3) == 0
    said = capsys.readouterr().out
    assert "Written: coco.\n" in said and "Not written, for nothing is marked: seg." in said

    nibabel = pytest.importorskip("nibabel")
    film = np.zeros((16, 20, 3, 2), np.int16) - 200
    nibabel.save(nibabel.Nifti1Image(film, np.diag([1, 1, 3, 1])), tmp_path / "film.nii")
    assert ask(tmp_path / "film.nii", tmp_path / "b", modality="CT") == 2
    assert "2: series-1/2 (unknown axial, 3 x 20 x 16)" in capsys.readouterr().err
    assert ask(tmp_path / "film.nii", tmp_path / "b", modality="CT", series=("2",), formats=("coco",)) == 0

    folder = MadeSeries(shape=(3, 20, 16)).write(tmp_path / "in" / "truncated")
    MadeSeries(shape=(3, 20, 16)).write(tmp_path / "in" / "whole")
    file = folder / "IM00001"
    file.write_bytes(file.read_bytes()[:-100])
    assert ask(tmp_path / "in", tmp_path / "c", series=("all",), formats=("seg",)) == 1
    said = capsys.readouterr()
    assert "truncated or damaged pixels" in said.err and "1 of 2 series answered" in said.out
    assert ask(single, tmp_path / "d", modality="MR") == 1
    assert "is CT, not MR" in capsys.readouterr().err
    assert ask(single, tmp_path / "d", smallest_ml=0.0, conditioning=("1",)) == 1
    assert "give a volume above 0" in capsys.readouterr().err

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert ask(single, tmp_path / "d", conditioning=("1",)) == 2
    error = capsys.readouterr().err
    assert "The disk is full" in error and error.count("\n") == 1 and not (tmp_path / "d").exists()
