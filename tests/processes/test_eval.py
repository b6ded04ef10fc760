"""`unibiomed eval` in two processes."""

import json

import pytest
from job import Job, environment
from places import MICRO, ROOT
from small_datasets import coco_table, save_picture, save_square, write_table

pytestmark = pytest.mark.scale


def test_two_processes_share_the_images_and_the_first_one_scores(tmp_path):
    env = environment(tmp_path)
    data = tmp_path / "liver"
    for number in range(4):
        save_picture(data / "test" / f"{number}.png", seed=number)
        save_square(data / "test_mask" / f"{number}_liver.png", corner=(number, number))
    write_table(data / "test.json", coco_table(4))
    (data / "test" / "2.png").write_bytes(b"no picture")
    script = str(ROOT / "unibiomed_jax" / "cli.py")
    runs = {}
    for processes in (2, 1):
        out = tmp_path / f"run{processes}"
        command = [script, "eval", "--checkpoint", str(MICRO), "--data", str(data), "--out", str(out),
                   "--max-new-tokens", "4", "--batch-size", "2"]  # fmt: skip
        codes, said = Job(command, env, processes=processes).wait()
        assert set(codes) == {1}, said  # one could not be answered
        assert "3 answered, 1 not" in said[0] and "seg2d, strict protocol" in said[0]
        assert all("answered" not in other for other in said[1:])
        assert [path.name for path in out.glob("samples*")] == ["samples_seg2d.jsonl"]
        lines = (out / "samples_seg2d.jsonl").read_text().splitlines()
        runs[processes] = [json.loads(line) for line in lines], (out / "results.csv").read_text()
    assert runs[1] == runs[2]
    assert [line["doc_id"] for line in runs[1][0]] == [f"{number}_liver.png" for number in range(4)]
