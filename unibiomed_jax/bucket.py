"""Buckets: folders of files under gs://BUCKET/... and s3://BUCKET/..., read and written over the network.

Three things are unlike a disk. There are no folders, only names with slashes: a folder is there as long as
something lies in it. Nothing can be renamed or appended to, but a file appears whole or not at all: a folder
is complete when the file that is written last is there. And every call can fail in many ways of the libraries
beneath, whose words may hold credentials: `told` makes a BucketError of them, with a path and a reason of
ours.

Access and credentials are those that the environment of the process gives to every tool (AWS_ACCESS_KEY_ID,
AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST, ...). Files go through
etils.epath and fsspec, as those that Orbax writes beside its arrays do; arrays go through TensorStore.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import importlib
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from etils.epath.gpath import PosixGPath

from unibiomed_jax.errors import BucketError, InputError

# Package that reads the buckets of a scheme.
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
# A request is tried so often, with pauses that double from a second on; after half a minute it is given up.
ATTEMPTS = 5
# Seconds without a byte after which a try has failed.
SILENCE = 15
# What to say about errors with such words in their kinds or messages, in this order.
_REASONS = (
    (r"NoSuchBucket|bucket does not exist", "there is no such bucket; correct its name or create it"),
    (
        r"NoCredentials|PartialCredentials|DefaultCredentials|Anonymous caller|UNAUTHENTICATED",
        "there are no credentials for it in the environment; set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS",
    ),
    (
        r"PermissionError|Access ?Denied|Forbidden|PERMISSION_DENIED|InvalidAccessKeyId|ExpiredToken|"
        r"SignatureDoesNotMatch|InvalidToken|Unauthorized|RefreshError|\b40[13]\b",
        "permission is denied; let the credentials in the environment read and write there, or take others",
    ),
    (
        r"Connect|Timeout|Disconnected|ClientPayload|IncompleteRead|UNAVAILABLE|DEADLINE_EXCEEDED|SlowDown|"
        r"TooManyRequests|rateLimit|CURL|TransportError|\b429\b|\b5\d\d\b",
        "the bucket does not answer; run the same command again when it does",
    ),
)


@contextlib.contextmanager
def told(path: str | os.PathLike) -> Iterator[None]:
    """Make of what the libraries of a bucket raise in the block a BucketError, or a plain FileNotFoundError.

    Where `path` lies on a disk, and for errors that are no answer of a bucket, nothing is changed.
    """
    try:
        yield
    except (BucketError, InputError):
        raise
    except Exception as error:
        if not isinstance(path, BucketPath):
            raise
        reason = _reason(error, path)
        if reason is not None:
            raise BucketError(f"{path} cannot be used: {reason}.") from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from None
        raise


def _reason(error: BaseException, path: BucketPath) -> str | None:
    """What is wrong with the bucket, and what to do; None if it is not the bucket."""
    text = _text(error, path)
    if re.search("DATA_LOSS|OUT_OF_RANGE", text):  # numbers in these are places in a file
        text = re.sub(r"\d+", "", text)
    missing = isinstance(error, FileNotFoundError)  # whose whole text is a path
    reasons = _REASONS[:1] if missing else _REASONS
    found = next((words for pattern, words in reasons if re.search(pattern, text)), None)
    if found is None and isinstance(error, OSError) and not missing:
        return "it refuses what is asked of it; see the log of the bucket"
    return found


def _text(error: BaseException | None, path: BucketPath) -> str:
    """Kinds and messages of an error and of its causes, without the path: numbers in that are no answers."""
    lines = []
    while error is not None:
        lines.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return "\n".join(lines).replace(os.fspath(path).partition("://")[2], "")


class BucketPath(PosixGPath):
    """A path in a bucket, with the methods of pathlib.Path that this package uses."""

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def iterdir(self) -> Iterator[BucketPath]:
        with contextlib.suppress(FileNotFoundError):  # an empty folder and none are the same
            yield from (self / PurePosixPath(name).name for name in self._ask("ls", detail=False))

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """What lies here under such names; a pattern has no slash."""
        yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def walk_files(self) -> dict[str, dict[str, Any]]:
        """What the bucket says of every file below, by its path from here."""
        found = self._ask("find", detail=True)
        start = len(os.fspath(self).partition("://")[2]) + 1
        return {name[start:]: entry for name, entry in sorted(found.items())}

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self._ask("info")["size"])

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_range(self, start: int, length: int) -> bytes:
        """As `files.read_range`: one request, which carries these bytes alone."""
        return self._ask("cat_file", start=start, end=start + length) if length else b""

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> None:
        self._ask("pipe_file", data)

    def write_if(self, data: bytes, version: str | None) -> bool:
        """Write the file if it still has this version (None: if there is none); whether that was so.

        A server that does not know such conditions writes it anyway.
        """
        scheme, rest = self.parts[1], os.fspath(self).partition("://")[2]
        try:
            if scheme == "s3":
                condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
                self._call("pipe_file", os.fspath(self), data, **condition)
            else:
                bucket, _, name = rest.partition("/")
                self._call(
                    "call",
                    "POST",
                    f"{_file_system(scheme)._location}/upload/storage/v1/b/{bucket}/o",
                    uploadType="media",
                    name=name,
                    ifGenerationMatch=version or "0",
                    data=data,
                    json_out=True,
                )
        except Exception as error:
            text = _text(error, self)
            if re.search(r"NotImplemented|\b501\b", text):
                self.write_bytes(data)
                return True
            gone = version is not None and isinstance(error, FileNotFoundError)
            if not (gone or re.search(r"FileExists|Precondition|pre-condition|conditionNotMet|\b412\b|"
                                      r"ConditionalRequestConflict", text)):  # fmt: skip
                with told(self):
                    raise
            return False
        return True

    def version(self) -> tuple[str, datetime]:
        """What changes whenever the file is written, and when that was, by the bucket's clock."""
        entry = self._ask("info")
        return str(entry.get("generation") or entry["ETag"]), self._ask("modified")

    def write_text(self, text: str, encoding: str | None = None) -> None:
        self.write_bytes(text.encode(encoding or "utf-8"))

    def put(self, local: str | os.PathLike) -> None:
        """Write the file from one on a disk, however large."""
        with told(self):
            self._call("put_file", os.fspath(local), os.fspath(self))

    def touch(self) -> None:
        self.write_bytes(b"")

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with its first file."""

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] * missing_ok):
            self._ask("rm_file")

    def rmtree(self) -> None:
        """Delete all files below, if there are any."""
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm", recursive=True)

    def absolute(self) -> BucketPath:
        return self

    resolve = absolute

    def _kind(self) -> str | None:
        try:
            return self._ask("info")["type"]
        except FileNotFoundError:
            return None

    def _ask(self, method: str, *values, **arguments) -> Any:
        with told(self):
            return self._call(method, os.fspath(self), *values, **arguments)

    def _call(self, method: str, *values, **arguments) -> Any:
        return getattr(_file_system(self.parts[1]), method)(*values, **arguments)


def open_bucket(path: str | os.PathLike) -> BucketPath:
    """A path in a bucket.

    Raises:
        InputError: the package that reads such buckets is not installed, or it names no bucket.
    """
    opened = BucketPath(os.fspath(path))
    if len(opened.parts) < 3:
        raise InputError(f"{os.fspath(path)} names no bucket; give one such as s3://BUCKET/FOLDER.")
    _file_system(opened.parts[1])
    return opened


@functools.cache
def _file_system(scheme: str):
    """The fsspec file system that epath, and so Orbax, uses for a scheme."""
    os.environ.setdefault("EPATH_USE_TF", "false")  # the same, whether TensorFlow is installed or not
    # The plain reader of gs://: the other one asks first, and warns, what kind of bucket it is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    package = _PACKAGES[scheme]
    try:
        library = importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"{scheme}:// needs the package {package}: pip install 'unibiomed-jax[bucket]'."
        ) from None
    import fsspec
    from etils.epath.backend import fsspec_backend

    # Other processes write, and TensorStore: a listing is never remembered.
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
        options["config_kwargs"] = {"retries": retries, "connect_timeout": SILENCE, "read_timeout": SILENCE}
        library.S3FileSystem.retries = 2  # of all these, for an answer that breaks off
    fsspec.config.conf[scheme] = options | fsspec.config.conf.get(scheme, {})
    return fsspec_backend.fs(f"{scheme}://")


@functools.cache
def teach_orbax() -> None:
    """Let Orbax write arrays into s3://, as it does into gs://, and give up on a bucket that does not answer.

    Orbax 0.12 gives TensorStore, which knows both, paths of gs:// alone, without a limit of tries that a user
    would wait for.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    prefixes = tuple(f"{scheme}://" for scheme in _PACKAGES)
    gcs_utils._GCS_PATH_PREFIX = prefixes
    gcs_utils.get_kvstore_for_gcs = _bucket_store
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(prefixes)
    tensorstore_utils._normalize_path = lambda path: path.rstrip("/")
    for name in ("CONNECT_TIMEOUT_SECONDS", "LOW_SPEED_TIME_SECONDS"):
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", str(SILENCE))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    if host := os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", host)


def array_store(folder: Path) -> dict[str, Any]:
    """TensorStore's description of a folder on a disk or in a bucket."""
    if isinstance(folder, BucketPath):
        return _bucket_store(f"{os.fspath(folder)}/")
    return {"driver": "file", "path": f"{os.fspath(folder)}/"}


def _bucket_store(path: str) -> dict[str, Any]:
    scheme, _, rest = path.partition("://")
    bucket, _, inside = rest.partition("/")
    retries = {"max_retries": ATTEMPTS, "initial_delay": "1s", "max_delay": "8s"}
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": inside, "gcs_request_retries": retries}
    store = {"driver": "s3", "bucket": bucket, "path": inside, "s3_request_retries": retries}
    environment = os.environ.get
    if endpoint := environment("AWS_ENDPOINT_URL_S3") or environment("AWS_ENDPOINT_URL"):
        store["endpoint"] = endpoint
    if region := environment("AWS_REGION") or environment("AWS_DEFAULT_REGION"):
        store["aws_region"] = region
    if environment("AWS_ACCESS_KEY_ID"):  # without looking elsewhere, and complaining of what is not there
        store["aws_credentials"] = {"type": "environment"}
    return store
