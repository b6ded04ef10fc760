"""Datasets in the layouts of their authors become records; what is wrong with them becomes one sentence."""

import csv
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from places import ROOT
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax.commands.eval.options import Format
from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.readers import FORMATS, image_folder, read_records
from unibiomed_jax.evaluation.readers.known import known_datasets
from unibiomed_jax.evaluation.readers.reference import reference_datasets
from unibiomed_jax.evaluation.records import decode_masks, from_json, to_json

# The reference's list of datasets as a table, where it lies beside the repository.
TABLE = ROOT.parent / "shared" / "spec" / "datasets.csv"


def slake(folder, **changes):
    row = {
        "img_id": 1, "img_name": "xmlab1/source.jpg", "question": "What modality is used?", "answer": "MRI",
        "q_lang": "en", "location": "Abdomen", "modality": "MRI", "answer_type": "OPEN", "base_type": "vqa",
        "content_type": "Modality", "triple": ["vhead", "_", "_"], "qid": 9835,
    }  # fmt: skip
    chinese = row | {
        "question": "图像里有肝脏吗？",
        "answer": "有",
        "q_lang": "zh",
        "answer_type": "CLOSED",
        "qid": 1,
    }
    save_picture(folder / "imgs/xmlab1/source.jpg")
    write_table(folder / "test.json", [row | changes, chinese])
    write_table(folder / "validate.json", [row])


def test_slake(tmp_path):
    slake(tmp_path)
    english, chinese = read_records(tmp_path, "test", (), format="slake")
    assert english.question == "<image>\nWhat modality is used?" and english.answer == "MRI"
    assert english.doc_id == "9835" and english.image == "imgs/xmlab1/source.jpg" and english.reason is None
    assert english.groups == {
        "modality": "MRI", "question_type": "Modality", "answer_type": "open", "location": "Abdomen",
        "knowledge": "vqa",
    }  # fmt: skip
    assert (english.dataset, chinese.dataset) == ("SLAKE en", "SLAKE zh")
    assert chinese.groups["answer_type"] == "closed"
    assert read_records(tmp_path, "test", ("vqa",), ("SLAKE zh",), "slake") == [chinese]
    assert len(read_records(tmp_path, "validation", (), format="slake")) == 1
    assert from_json(json.loads(json.dumps(to_json(english, 0))), "here") == english


def vqa_rad(folder, *rows):
    row = {
        "qid": 11, "image_name": "synpic42202.jpg", "image_organ": "CHEST", "answer": "yes",
        "answer_type": "CLOSED ", "question_type": "PRES", "question": "Is there an aneurysm?",
        "phrase_type": "freeform",
    }  # fmt: skip
    save_picture(folder / "images/synpic42202.jpg")
    write_table(folder / "testset.json", [row, *(row | changed for changed in rows)])


def test_vqa_rad(tmp_path):
    """Its types have blanks behind them, and some answers are numbers."""
    vqa_rad(tmp_path, {"qid": 12, "answer": 2, "answer_type": "OPEN"}, {"qid": 13, "image_name": "gone.jpg"})
    first, number, gone = read_records(tmp_path, "test", (), format="vqa-rad")
    assert first.groups == {
        "question_type": "PRES", "answer_type": "closed", "organ": "CHEST", "phrase": "freeform",
    }  # fmt: skip
    assert (number.answer, number.groups["answer_type"]) == ("2", "open")
    assert gone.reason == "the image images/gone.jpg is missing; copy it there"


def test_vqa_rad_as_published():
    folder = ROOT.parent / "shared" / "data" / "vqa_rad"
    if not folder.exists():
        pytest.skip("lies beside the repository only")
    found = read_records(folder, "test", (), format="vqa-rad")
    assert Counter(sample.groups["answer_type"] for sample in found) == {"closed": 272, "open": 179}


def pathvqa(folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    files = []
    for seed in (0, 1):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        files.append(file.getvalue())
    rows = [(0, "where are liver stem cells located?", "in the canals of hering"), (0, "is it bile?", "yes"),
            (1, "is it red?", "no")]  # fmt: skip
    (folder / "data").mkdir()
    for number, part in enumerate((rows[:2], rows[2:])):
        table = pyarrow.table(
            {
                "image": [{"bytes": files[image], "path": None} for image, _, _ in part],
                "question": [question for _, question, _ in part],
                "answer": [answer for _, _, answer in part],
            }
        )
        parquet.write_table(table, folder / "data" / f"test-0000{number}-of-00002-abc.parquet")


def test_pathvqa(tmp_path):
    """Images are unpacked once, whatever is asked about them."""
    pathvqa(tmp_path)
    found = read_records(tmp_path, "test", (), format="parquet")
    assert [sample.answer for sample in found] == ["in the canals of hering", "yes", "no"]
    assert [sample.groups["answer_type"] for sample in found] == ["open", "closed", "closed"]
    assert found[0].image == found[1].image != found[2].image
    assert Image.open(tmp_path / found[0].image).size == (9, 8)
    assert read_records(tmp_path, "test", (), format="parquet") == found
    damaged = next(tmp_path.glob("data/*"))
    damaged.write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=rf"{damaged.name} is damaged \(.*\); download it again"):
        read_records(tmp_path, "test", (), format="parquet")


def omnimedvqa(folder, **changes):
    row = {
        "dataset": "ACRIMA", "question_id": "ACRIMA_0000", "question_type": "Modality Recognition",
        "question": "What imaging technique was employed?", "gt_answer": "Fundus imaging",
        "image_path": "Images/ACRIMA/Im002_ACRIMA.png", "option_A": "PET scan", "option_B": "Fundus imaging",
        "modality_type": "Fundus Photography",
    }  # fmt: skip
    other = {name: value for name, value in row.items() if name != "modality_type"}
    other |= {"question_id": "ACRIMA_0001", "modality": "CT"}
    save_picture(folder / "Images/ACRIMA/Im002_ACRIMA.png")
    write_table(folder / "QA_information/Open-access/ACRIMA.json", [row | changes, other])


def test_omnimedvqa(tmp_path):
    omnimedvqa(tmp_path)
    first, other = read_records(tmp_path, "test", (), format="omnimedvqa")
    assert first.choices == ("PET scan", "Fundus imaging") and first.doc_id == "ACRIMA/ACRIMA_0000"
    assert first.question == (
        "<image>\nWhat imaging technique was employed?\nA. PET scan\nB. Fundus imaging\n"
        "Answer with one of these options."
    )
    assert (first.groups["modality"], other.groups["modality"]) == ("Fundus Photography", "CT")
    assert first.groups["question_type"] == "Modality Recognition" and "answer_type" not in first.groups


def mecovqa(folder):
    image, mask = "SAMed2Dv1/images/ct_00--A--1.png", "SAMed2Dv1/masks/ct_00--A--1--0001_000.png"
    save_picture(folder / image)
    save_square(folder / mask)

    def table(name, asked, said, **more):
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        write_table(folder / name, [{"image": image, "conversations": turns, **more}])

    table("MeCoVQA_Grounding_test.json", "<image>\nWhere is the liver?", f"Here <SEG>.<mask>{mask}</mask>")
    table("MeCoVQA_Region_VQA_test.json", f"<image>\nWhat is <region>{mask}</region>?", "The liver.")
    table("MeCoVQA_Complex_VQA_test.json", "<image>\nIs it CT?", "Yes", answer_type="CLOSED")
    table("MeCoVQA-Complex.json", "<image>\nIs it trained on?", "Yes")


def test_mecovqa(tmp_path):
    mecovqa(tmp_path)
    found = {sample.task: sample for sample in read_records(tmp_path, "test", (), format="mecovqa")}
    assert list(found) == ["vqa", "seg2d", "region"]
    assert found["seg2d"].question == "<image>Where is the liver?"
    assert (found["seg2d"].category, found["seg2d"].answer) == ("ct", None)
    assert found["region"].question == "<image>\nWhat is <region>?" and found["region"].answer == "The liver."
    for task in ("seg2d", "region"):
        (mask,) = decode_masks(found[task].truth_masks, "")
        assert mask.sum() == 144
    assert found["vqa"].groups == {"modality": "ct", "answer_type": "closed"}
    mask = tmp_path / "SAMed2Dv1/masks/ct_00--A--1--0001_000.png"
    mask.write_bytes(b"no mask")
    (damaged,) = read_records(tmp_path, "test", ("seg2d",), format="mecovqa")
    assert mask.name in damaged.reason and damaged.truth_masks == ()
    mask.unlink()
    (missing,) = read_records(tmp_path, "test", ("region",), format="mecovqa")
    assert mask.name in missing.reason and "\n" not in missing.reason


def test_mecovqa_g_plus_has_paths_inside_its_images(tmp_path):
    mecovqa(tmp_path)
    (row,) = json.loads((tmp_path / "MeCoVQA_Grounding_test.json").read_text())
    inside = json.loads(json.dumps({"id": "ct_00--A--1", **row}).replace("SAMed2Dv1/", ""))
    write_table(tmp_path / "MeCoVQA_Grounding_test_merged_modified_v3.json", [inside])
    one, plus = read_records(tmp_path, "test", ("seg2d",), format="mecovqa")
    assert (one.dataset, plus.dataset) == ("MeCoVQA Grounding", "MeCoVQA G+")
    assert plus.reason is None and (plus.image, plus.truth_masks) == (one.image, one.truth_masks)


OWN = [
    {"image": "a.png", "question": "Is it CT?", "answer": "Yes", "patient": "p1", "modality": "CT"},
    {"image": "a.png", "question": "What\u2028is it?", "answer": "liver", "split": "train"},
]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json"])
def test_a_table_of_ones_own(tmp_path, ending):
    save_picture(tmp_path / "a.png")
    path = tmp_path / f"mine.{ending}"
    if ending == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["image", "question", "answer", "patient", "modality", "split"])
            writer.writeheader()
            writer.writerows(OWN)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in OWN]
        path.write_text("\n".join(lines) if ending == "jsonl" else f"[{', '.join(lines)}]")
    (one,) = read_records(path, "test", (), format="table")
    assert (one.patient, one.dataset, one.image, one.answer) == ("p1", "mine", "a.png", "Yes")
    assert one.groups == {"modality": "CT", "answer_type": "closed"}
    assert image_folder(path) == tmp_path and image_folder(tmp_path) == tmp_path
    anywhere, trained = read_records(path, "train", (), format="table")  # the first says no split
    assert anywhere == one and trained.question == "<image>\nWhat\u2028is it?"


def biomedparse(folder):
    save_picture(folder / "demo/06_CT_abdomen.png")
    table = {"images": [{"id": 0, "file_name": "06_CT_abdomen.png"}], "annotations": [], "categories": []}
    for number, target in enumerate(("liver", "left kidney")):
        mask = f"06_CT_abdomen_{target.replace(' ', '+')}.png"
        save_square(folder / "demo_mask" / mask, side=8 + number)
        sentence = {"raw": f"{target} in abdomen CT", "sent": f"{target} in abdomen CT", "sent_id": number}
        table["annotations"].append(
            {"id": number, "ann_id": number, "ref_id": number, "image_id": 7, "category_id": 1,
             "split": "demo", "file_name": "06_CT_abdomen.png", "mask_file": mask,
             "sentences": [sentence]}
        )  # fmt: skip
    write_table(folder / "demo.json", table)


def test_biomedparse(tmp_path):
    biomedparse(tmp_path / "BiomedParseData-Demo")
    for data, name in (("BiomedParseData-Demo", "BiomedParseData-Demo"), (".", "BiomedParseData-Demo")):
        liver, kidney = read_records(tmp_path / data, "demo", ("seg2d",), format="biomedparse")
        assert liver.question == "<image>Please segment liver in abdomen CT."
        assert (liver.dataset, kidney.category) == (name, "left kidney in abdomen CT")
        assert decode_masks(kidney.truth_masks, "")[0].sum() == 81


def test_biomedparse_masks_named_as_their_images(tmp_path):
    biomedparse(tmp_path)
    table = json.loads((tmp_path / "demo.json").read_text())
    del table["annotations"][0]["mask_file"]
    write_table(tmp_path / "demo.json", table)
    save_square(tmp_path / "demo_mask/06_CT_abdomen.png", side=5)
    first, _ = read_records(tmp_path, "demo", (), format="biomedparse")
    assert decode_masks(first.truth_masks, "")[0].sum() == 25


def reference(folder, **sizes):
    """One folder that is segmented and asked about by regions, and one of a disease."""
    for name in ("BreastUS", "Disease/Skin"):
        table = coco_table(2, "Tumor in breast US", **sizes)
        table["annotations"].reverse()
        for number, annotation in enumerate(table["annotations"]):
            save_picture(folder / name / "test" / annotation["file_name"])
            save_square(folder / name / "test_mask" / annotation["mask_file"], side=5 + number)
            annotation["sentences"][0]["raw"] = "tumor in breast us"
        write_table(folder / name / "test.json", table)


def test_the_references_tables(tmp_path):
    """The folder tells the kind of task; targets come in the order of the annotations, as `sent` says."""
    reference(tmp_path)
    found = read_records(tmp_path, "test", (), format="reference")
    assert Counter((sample.task, sample.dataset) for sample in found) == {
        ("seg2d", "BreastUS"): 2, ("region", "BreastUS"): 2, ("disease", "Disease/Skin"): 2,
    }  # fmt: skip
    targets = [sample for sample in found if sample.task == "seg2d"]
    assert [sample.image for sample in targets] == ["BreastUS/test/1.png", "BreastUS/test/0.png"]
    assert targets[0].question == "<image>Please segment Tumor in breast US."
    assert {sample.answer for sample in found if sample.task == "disease"} == {"tumor in breast us"}


def test_reports_are_compared_with_the_captions_of_their_images(tmp_path):
    place = tmp_path / "RadGenome"
    entry = {"abnormality": "nodule", "anatomy": "lung", "report": "Long.", "mask_file": "test_mask/m.png"}
    names = ("one.png", "two.png", "none.png")
    for name in names:
        save_picture(place / "test" / name)
    save_square(place / "test_mask/m.png")
    write_table(
        place / "test_parse.json",
        {str(n): entry | {"image_file": f"test/{name}"} for n, name in enumerate(names)},
    )
    captions = [("one.png", "A nodule."), ("two.png", "A."), ("two.png", "B."), ("none.png", None)]
    sentences = [{"raw": "nodule", "sent": "nodule"}]
    annotations = [
        {"file_name": name, "caption": caption, "mask_file": "m.png", "sentences": sentences}
        for name, caption in captions
    ]
    images = [{"file_name": name} for name in names]
    write_table(place / "test.json", {"images": images, "annotations": annotations})
    found = read_records(tmp_path, "test", ("report",), format="reference")
    answers = {sample.image.rpartition("/")[2]: sample.answer for sample in found}
    assert answers == {"one.png": "A nodule.", "two.png": None, "none.png": None}


def test_masks_of_any_name_keep_the_references_order(tmp_path):
    table = coco_table(3, "Tumor in breast US")
    names = ["b#2.png", "./a.png", "c.png"]
    for annotation, name in zip(table["annotations"], names, strict=True):
        annotation["mask_file"] = name
        save_picture(tmp_path / "BreastUS" / "test" / annotation["file_name"])
        save_square(tmp_path / "BreastUS" / "test_mask" / name)
    write_table(tmp_path / "BreastUS" / "test.json", table)
    found = read_records(tmp_path, "test", ("seg2d",), format="reference")
    assert [sample.doc_id for sample in found] == [
        f"BreastUS/{name}" for name in ("b#2.png", "a.png", "c.png")
    ]


def test_all_of_the_references_datasets():
    found = reference_datasets()
    trained = [dataset for dataset in found if dataset.trained]
    assert len(trained) == 95 and len({(dataset.kind, dataset.folder) for dataset in found}) == len(found)
    assert Counter(dataset.task for dataset in found if dataset.evaluated) == {
        "seg2d": 51, "region": 51, "disease": 16, "gvqa": 1, "report": 1, "caption": 1,
    }  # fmt: skip
    if TABLE.exists():
        rows = list(csv.DictReader(TABLE.open()))
        assert [dataset.name for dataset in trained] == [row["config_name"] for row in rows]
        for dataset, row in zip(trained, rows, strict=True):
            root, table = (row[name].removeprefix("./data/Biomed/") for name in ("root", "annotation_file"))
            config = dataset.config(ROOT, "train")
            assert (dataset.folder, ROOT / table) == (root, config.annotation_path)


def test_what_is_known_says_licence_and_place():
    found = known_datasets()
    assert {dataset.format for dataset in found} == set(FORMATS) == set(Format.__args__)
    assert all(dataset.licence and dataset.where and dataset.tasks for dataset in found)


def wrong(tmp_path, name):
    """A dataset with something wrong in it, and what is said about it."""
    if name == "nothing of the task":
        slake(tmp_path)
        return "slake", ("seg2d",), "has no record of seg2d in the split 'test'; correct --data, --format"
    if name == "two of one name":
        vqa_rad(tmp_path, {"question": "Is there another?"})
        return "vqa-rad", (), "has two records 11 of vqa; rename one of them."
    if name == "no table":
        return "slake", (), "test.json is missing; download SLAKE and unpack imgs.zip beside its tables."
    if name == "another table":
        write_table(tmp_path / "test.json", {"images": []})
        return "slake", (), "test.json is no list of questions; download SLAKE"
    if name == "no answer":
        slake(tmp_path, answer=None)
        return "slake", (), "test.json, entry 1 has no answer; correct the file, or download it again."
    if name == "an answer that is no option":
        omnimedvqa(tmp_path, gt_answer="MR")
        return "omnimedvqa", (), "entry 1 has an answer that is none of its options; correct one of them."
    if name == "no parquet":
        return "parquet", (), "has no test-*.parquet; download the dataset, or correct --data or --split."
    if name == "no conversation":
        write_table(tmp_path / "MeCoVQA_Complex_VQA_test.json", [{"image": "a.png", "conversations": [{}]}])
        return "mecovqa", (), "entry 1 has no conversation of questions and answers; download it again."
    if name == "a folder for a table":
        return "table", (), "is a folder; name the table itself with --data."
    return "reference", (), "holds none of UniBiomed's datasets with a split 'test'"


@pytest.mark.parametrize(
    "name",
    ["nothing of the task", "two of one name", "no table", "another table", "no answer", "no conversation",
     "an answer that is no option", "no parquet", "a folder for a table", "an empty folder"],
)  # fmt: skip
def test_one_sentence_for_what_is_wrong(tmp_path, name):
    format, tasks, sentence = wrong(tmp_path, name)
    with pytest.raises(InputError) as error:
        read_records(tmp_path, "test", tasks, format=format)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_rows_are_named_by_their_id(tmp_path):
    """Also by 0, which is false."""
    path = tmp_path / "mine.json"
    row = {"image": "a.png", "question": "?", "answer": "yes"}
    write_table(path, [row | {"id": 1}, row | {"id": 0}, row])
    assert [found.doc_id for found in read_records(path, "test", (), format="table")] == ["1", "0", "3"]


def test_a_cell_that_csv_cannot_hold(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(f"image,question,answer\na.png,?,{'a' * 140_000}\n")
    with pytest.raises(InputError, match="mine.csv is no table that can be read .field .*; write a row"):
        read_records(path, "test", (), format="table")


def test_names_that_nothing_has(tmp_path):
    slake(tmp_path)
    with pytest.raises(InputError, match="has no dataset Slack in the split 'test', but SLAKE en, SLAKE zh"):
        read_records(tmp_path, "test", (), ("Slack",), "slake")
    with pytest.raises(InputError, match="there does not exist; correct --data"):
        read_records(tmp_path / "there", "test", (), format="slake")
    (tmp_path / "mine.jsonl").write_text('{"image": "a.png"}\n{"image": \n')
    with pytest.raises(
        InputError, match="line 2 is no JSON object; write a row with image, question and answer"
    ):
        read_records(tmp_path / "mine.jsonl", "test", (), format="table")
