"""The README's lines of Python, run as they stand."""

import re

from PIL import Image
from places import ROOT


def test_the_lines_of_python_make_the_picture(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for folder in ("checkpoints", "sample_data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "research use" in capsys.readouterr().out.lower()
    with Image.open("overlay.png") as picture:
        assert min(picture.size) > 100
