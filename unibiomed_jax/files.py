"""Where files lie and what they are called, JSON files, and folders that appear whole or not at all."""

import contextlib
import errno
import functools
import io
import json
import os
import re
import shutil
import tempfile
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from unibiomed_jax.errors import BucketError, DiskFullError, InputError

# What a full disk is called.
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

BUCKETS = ("gs://", "s3://")

# What would break a message into lines, or steer the terminal that shows it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def locate(path: str | os.PathLike) -> Path:
    """A path on a disk, or in a bucket (gs://..., s3://...), which has the methods of one that are used here.

    Raises:
        InputError: the package that reads such a bucket is not installed.
    """
    if not in_bucket(path):
        return Path(path)
    from unibiomed_jax.bucket import open_bucket  # most runs need none

    return open_bucket(path)


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket and not on a disk."""
    return os.fsdecode(path).startswith(BUCKETS)


def shown(name: str | os.PathLike) -> str:
    """A path, or a message with paths in it, as text for messages, terminals and JSON.

    Names on disk are bytes. Those that are no UTF-8 text, which Python keeps as lone surrogates, and control
    characters are written as escapes: `caf\\xe9.png`.
    """
    text = os.fsdecode(name)
    try:
        text = os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def is_text(name: str | os.PathLike) -> bool:
    """Whether a name or a text can be written as UTF-8."""
    try:
        os.fsdecode(name).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def spelled(name: str) -> str:
    """A name in one spelling (Unicode NFC): macOS writes é as two characters, other systems as one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def find_file(path: str | os.PathLike) -> str:
    """The path as it is spelled on disk (see `spelled`); unchanged where there is no such file."""
    path = os.fspath(path)
    if path.isascii() or in_bucket(path) or os.path.exists(path):
        return path
    folder, name = os.path.split(path)
    if not name or folder == path:
        return path
    folder = find_file(folder)
    try:
        found = _spellings(folder, os.stat(folder or ".").st_mtime_ns).get(spelled(name), [])
    except OSError:
        return path
    return os.path.join(folder, found[0]) if len(found) == 1 else path


@functools.lru_cache(maxsize=64)
def _spellings(folder: str, changed: int) -> dict[str, list[str]]:
    """The names in a folder by their one spelling; `changed` tells its states apart."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder or "."):
        names.setdefault(spelled(name), []).append(name)
    return names


def read_text(path: str | os.PathLike, *, remedy: str = "write it again", encoding: str | None = None) -> str:
    """The text of a JSON file in UTF-8, with or without a byte-order mark, or in the UTF-16 of Windows tools.

    Args:
        path: of the file.
        remedy: what to do about a file that cannot be used.
        encoding: another file's; by default the one in which JSON, by its first bytes, is written.

    Raises:
        InputError: the file is missing, cannot be read, or is no such text.
    """
    try:
        data = locate(path).read_bytes()
        return data.decode(encoding or json.detect_encoding(data))
    except FileNotFoundError:
        raise InputError(f"{shown(path)} is missing; {remedy}.") from None
    except OSError as error:
        raise InputError(
            f"{shown(path)} cannot be read ({error.strerror}); change its permissions."
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(path)} is truncated or damaged ({error}); {remedy}.") from None


def read_json(
    path: str | os.PathLike,
    *,
    remedy: str = "write it again",
    complaint: str = "is not valid JSON",
    unique_keys: bool = False,
) -> Any:
    """The value of a JSON file in any encoding of `read_text`.

    Args:
        path: of the file.
        remedy: what to do about a file that cannot be used.
        complaint: what is wrong with one that is not JSON.
        unique_keys: refuse an object that names one key twice, whose first value would be lost.

    Raises:
        InputError: as `read_text`, or the file is not JSON, or a text in it is no valid Unicode.
    """
    text = read_text(path, remedy=remedy)
    try:
        value = json.loads(text, object_pairs_hook=unlike_keys if unique_keys else None)
        if "\\ud" in text or "\\uD" in text:  # an escape that may be half of a character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = "half a character in it" if isinstance(error, UnicodeEncodeError) else error
        raise InputError(f"{shown(path)} {complaint} ({reason}); {remedy}.") from None
    return value


def unlike_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (`object_pairs_hook`); ValueError if it names a key twice, which would lose a value."""
    table = dict(pairs)
    if len(table) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} occurs twice in it")
    return table


def read_range(path: str | os.PathLike, start: int, length: int) -> bytes:
    """`length` bytes of a file from `start` on; fewer where it ends before.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        if in_bucket(path):
            return locate(path).read_range(start, length)
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, start)
    except FileNotFoundError:
        raise InputError(f"{shown(path)} is missing; copy it again from its source.") from None
    except OSError as error:
        raise InputError(
            f"{shown(path)} cannot be read ({error.strerror}); check the disk and its permissions."
        ) from None


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A file to read; one in a bucket is fetched as a whole."""
    return io.BytesIO(locate(path).read_bytes()) if in_bucket(path) else open(path, "rb")


def sizes(folder: str | os.PathLike) -> dict[str, int]:
    """Bytes of every file that lies in a folder, by its name; of a bucket asked in one go."""
    if in_bucket(folder):
        return {name: entry["size"] for name, entry in locate(folder).walk_files().items() if "/" not in name}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def write_beside(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file beside its place and move it there, so that no reader ever sees half of it.

    In a bucket a file appears whole anyway.
    """
    if in_bucket(path):
        with io.BytesIO() as file:
            content(file) if callable(content) else file.write(content)
            path.write_bytes(file.getvalue())
        return
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(beside, "wb") as file:
            content(file) if callable(content) else file.write(content)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def local_file(path: Path) -> Iterator[Path]:
    """A file to write at any place of it: `path` itself, or one on a disk that then goes into the bucket.

    Raises:
        DiskFullError: the disk for temporary files is full.
    """
    if not in_bucket(path):
        yield path
        return
    with local_folder(path.parent) as folder:
        yield folder / path.name


@contextlib.contextmanager
def local_folder(folder: Path) -> Iterator[Path]:
    """A folder to write such files in: `folder` itself, or one on a disk whose files then go into the bucket.

    Raises:
        DiskFullError: the disk for temporary files is full.
    """
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="unibiomed-") as scratch:
        try:
            yield Path(scratch)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFullError(
                    f"What goes to {folder} does not fit into {tempfile.gettempdir()} meanwhile; set "
                    "TMPDIR to a larger disk."
                ) from None
            raise
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                (folder / path.relative_to(scratch)).put(path)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends, and vanishes when it fails.

    A bucket can rename nothing: there the folder is `path` itself, and whole as soon as the file is there
    that its writer writes last.

    Raises:
        InputError: `path` exists and `overwrite` is false, or its parent cannot be written.
        DiskFullError: the disk is full.
    """
    path = locate(path).absolute()
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another folder or pass --overwrite.")
    if in_bucket(path):
        path.rmtree()
        try:
            yield path
        except BaseException:
            with contextlib.suppress(BucketError):  # what went wrong first is what counts
                path.rmtree()
            raise
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{path} cannot be created ({error.strerror}); choose another place.") from None
    try:
        yield partial
        old = partial.with_name(f"{partial.name}.old")
        if overwrite and path.exists():
            os.replace(path, old)
        try:
            os.replace(partial, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        if old.exists():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = getattr(error, "errno", None) in NO_SPACE
        if full or "No space left on device" in str(error):
            raise DiskFullError(f"The disk of {path} is full; free some space and run again.") from None
        raise


def delete_folder(path: Path) -> None:
    """Delete a folder and all in it, if it is there."""
    if in_bucket(path):
        path.rmtree()
    elif path.exists():
        shutil.rmtree(path)


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder, and of those below it, into a new one."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())


def require_space(path: str | os.PathLike, needed: int) -> None:
    """Raise InputError unless `needed` bytes are free where `path` will be; a bucket has room for all."""
    if in_bucket(path):
        return
    parent = next(parent for parent in Path(path).absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{path} needs {needed / 1e9:.2f} GB but only {free / 1e9:.2f} GB are free there; free some "
            "space or choose another disk."
        )
