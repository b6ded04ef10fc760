"""Tables read piece by piece: the same values, the same complaints."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unibiomed_jax.data import streamed
from unibiomed_jax.data.records import Kind
from unibiomed_jax.data.streamed import Spilled, SpilledObject, read_members
from unibiomed_jax.data.tables import read_table
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import read_json

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def plain(value):
    """As `json` would have given it."""
    if isinstance(value, Spilled):
        return [value[number] for number in range(len(value))]
    return dict(value.items()) if isinstance(value, SpilledObject) else value


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.dictionaries(st.text() | st.sampled_from(streamed.LARGE), VALUES, max_size=4),
    piece=st.integers(4, 60),
    indent=st.sampled_from([None, 1]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    ascii_only=st.booleans(),
)
def test_a_table_is_read_as_json_reads_it(tmp_path, monkeypatch, table, piece, indent, encoding, ascii_only):
    """Wherever a piece ends: within a number, a text, an escape, a character."""
    path = tmp_path / "table.json"
    text = json.dumps(table, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    monkeypatch.setattr(streamed, "_READ", piece)
    try:
        expected = read_json(path, unique_keys=True)
    except InputError:
        with pytest.raises(ValueError):
            read_members(path, depth=2)
        return
    assert {key: plain(value) for key, value in read_members(path, depth=2).items()} == expected
    assert plain(read_members(path, depth=1)) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": [1, 2', "is not valid JSON"),
        ('{"a": [1, 2]} 3', "is not valid JSON"),
        ('{"a": [1 2]}', "is not valid JSON"),
        ('{"a" [1]}', "is not valid JSON"),
        ('{"a": 1,}', "is not valid JSON"),
        ("{1: 2}", "is not valid JSON"),
        ("", "is not valid JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": [{"b": 1, "b": 2}]}', "the key 'b' occurs twice"),
        ('{"a": ["\\ud800"]}', "half a character"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("kind", [Kind.SEGMENTATION, Kind.VQA])
def test_what_is_wrong_is_said_as_of_any_json_file(tmp_path, text, complaint, kind):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_table(tmp_path / "table.json", kind)


def test_a_table_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "_READ", 1 << 16)
    rows = [{"file_name": f"{number}.png", "caption": f"Picture {number}. " * 40} for number in range(5_000)]
    (tmp_path / "table.json").write_text(json.dumps({"annotations": rows}))
    tracemalloc.start()
    annotations = read_table(tmp_path / "table.json", Kind.CAPTION)["annotations"]
    assert sum(len(row["caption"]) for row in annotations) == sum(len(row["caption"]) for row in rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert annotations[1234] == rows[1234] and len(annotations) == len(rows)
    assert peak < 1 << 20 < (tmp_path / "table.json").stat().st_size / 2


def test_only_what_grows_with_a_dataset_is_spilled(tmp_path):
    """Each spilled list is an open file: a table of another kind may have a hundred thousand members."""
    table = {f"{number}.png": [number] for number in range(2000)} | {"images": [1, 2]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    read = read_members(tmp_path / "table.json", depth=2)
    assert isinstance(read["images"], Spilled) and list(read["images"]) == [1, 2]
    assert not any(isinstance(value, Spilled) for name, value in read.items() if name != "images")
    assert read["7.png"] == [7]
