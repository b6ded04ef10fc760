"""Accounts as containers have them: without a name, without a home, or with one that cannot be written."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from unibiomed_jax import InputError, runtime


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture
def unprepared(monkeypatch):
    """A process that has not chosen a cache folder yet."""
    chosen = []
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    config = SimpleNamespace(
        jax_compilation_cache_dir=None, update=lambda name, value: chosen.append((name, value))
    )
    monkeypatch.setattr(runtime, "jax", SimpleNamespace(config=config, default_backend=lambda: "none"))
    return chosen


def test_an_account_without_a_home_computes_without_a_cache(unprepared, monkeypatch):
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InputError, match="no home folder .*; set XDG_CACHE_HOME to a folder"):
        runtime.cache_folder("converted")
    runtime.prepare.__wrapped__()
    assert "jax_compilation_cache_dir" not in dict(unprepared)


def test_a_home_that_cannot_be_written_is_no_error(unprepared, monkeypatch, tmp_path):
    (tmp_path / ".cache").write_text("a file in the way")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    runtime.prepare.__wrapped__()
    assert "jax_compilation_cache_dir" not in dict(unprepared)


def test_the_cache_lies_in_the_home(unprepared, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    runtime.prepare.__wrapped__()
    folder = Path(dict(unprepared)["jax_compilation_cache_dir"])
    assert folder == tmp_path / ".cache" / "unibiomed_jax" / "compiled" and folder.is_dir()
