"""The README's lines of Python, run as they stand; what it and the other pages name is there."""

import re
import shlex

import pytest
from PIL import Image
from places import ROOT

from unibiomed_jax import cli

pytestmark = pytest.mark.slow

PACKAGE = ROOT / "unibiomed_jax"
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]


def test_the_lines_of_python_make_the_picture(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for folder in ("checkpoints", "sample_data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "research use" in capsys.readouterr().out.lower()
    with Image.open("overlay.png") as picture:
        assert min(picture.size) > 100


def test_its_commands_are_understood():
    commands = [shlex.split(command) for command in re.findall(r"`unibiomed ([^`]*)`", README)]
    whole = [command for command in commands if "--help" not in command and "..." not in command]
    names = {"predict", "study", "data", "convert", "eval", "explain-sharding", "plan", "export"}
    assert {command[0] for command in whole} == names
    understood = {type(cli.parse(command)) for command in whole}
    assert understood == set(cli.PLACES) - {cli.BuildOptions}  # of which the README shows the help


def test_its_tree_names_every_room():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    tree = README.partition("## Where things are")[2].partition("```\n")[2].partition("```")[0]
    assert set(re.findall(r"^ +(\w+)/ ", tree, re.MULTILINE)) == rooms


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert all(link.startswith("https://") or (page.parent / link).exists() for link in links), links


def test_files_to_open_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = re.findall(r"^\| (?!to change|-)[^|]*\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    assert len(table) == 23
    for room, files in table:
        first, *_ = named(files)
        assert first.startswith(f"{room}/")
    files = [file for file in named(text) if "NAME" not in file]
    assert len(files) > 30
    missing = [
        file
        for file in files
        if not any((folder / file).is_file() for folder in (ROOT, PACKAGE, *ROOT.glob("tests/*/")))
    ]
    assert not missing


def named(text: str) -> list[str]:
    """The Python files that a text names."""
    return re.findall(r"`([\w/]+\.py)`", text)
