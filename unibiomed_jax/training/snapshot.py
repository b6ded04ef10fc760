"""Checkpoints that a run resumes from, to the bit.

    <folder>/00000500/
        state/           an Orbax checkpoint of the train state (and, with `save_frozen`, of what is frozen)
        config.json      the run's configuration
        position.json    where the data pipeline stood
        tokenizer/       the tokenizer's files
        about.json       step, measures, shapes of the state, and what it belongs to
        manifest.json    size and checksum of every file above; written last

A checkpoint is written beside its place and moved there when it is complete, so that a folder with that name
is either whole or was damaged later, which the manifest shows. Older ones go only after that. In a bucket,
where nothing can be moved, it is written in its place and complete as soon as its manifest is there.

Of several processes every one writes its shares of the state; all else is done by the first, in a folder
that all of them must see.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

from unibiomed_jax import distributed, locks
from unibiomed_jax.bucket import told
from unibiomed_jax.checkpoint import saving_options
from unibiomed_jax.errors import BucketError, InputError
from unibiomed_jax.files import NO_SPACE, delete_folder, in_bucket, locate
from unibiomed_jax.inputs.tokenizer import copy_tokenizer
from unibiomed_jax.training.config import CheckpointConfig

logger = logging.getLogger(__name__)
# What a thread of Orbax meets is raised by `wait`, and said then.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in record.getMessage())

PARTIAL = ".partial"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Restored:
    """What a run goes on from."""

    # The tree that was asked for, laid out as asked.
    state: Any
    # State of the data iterator.
    position: dict
    # Update at which it was saved.
    step: int
    # The configuration it was saved with, as JSON values.
    config: dict


class Checkpointer:
    """Saves in the background and keeps the newest and the best.

    One save runs at a time; the next one waits for it. An error of the background (a full disk, say) is
    raised by the next call of `save`, `wait` or `check`. As a context manager it waits for a running save,
    however the block ends.
    """

    def __init__(self, folder: str | os.PathLike, config: CheckpointConfig):
        """Open a folder of checkpoints, and create it where there is none.

        Raises:
            InputError: it cannot be created.
        """
        self.folder = locate(folder).absolute()
        self.config = config
        self._primary = distributed.is_first()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be created ({error}); choose another --folder."
            ) from error
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._lock: locks.Lock | None = None
        # Steps of the checkpoints that were found damaged and passed over.
        self._damaged: set[int] = set()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._thread is not None:
            self._thread.join()
        if error is None:
            self.wait()

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Make the run's folder this job's own inside, and clear what a killed run left unfinished.

        Raises:
            InputError: another job trains in the folder (`check` says it where one took it from this), or the
                processes of this one do not all see it.
        """
        with contextlib.ExitStack() as stack:
            name = distributed.first_says(lambda: self._lock_and_clear(stack))
            seen = distributed.gather(_appears(self.folder / name))
            if not all(seen):
                raise InputError(
                    f"Process {seen.index(False)} does not see what process 0 writes into {self.folder}; "
                    "choose a --folder on storage that all machines share."
                )
            if self._primary:
                (self.folder / name).unlink()
            yield

    def _lock_and_clear(self, stack: contextlib.ExitStack) -> str:
        """What `claim` does on the first process; names a file that only shows that the folder is seen."""
        run = self.folder.parent
        remedy = "wait until it ends, stop it, or choose another --folder"
        self._lock = stack.enter_context(locks.hold(run / "lock", does=f"trains in {run}", remedy=remedy))
        name = f"{uuid.uuid4().hex}{PARTIAL}"
        (self.folder / name).touch()
        for path in self.folder.iterdir():
            unfinished = path.name.isdigit() and not _is_complete(path)
            if (unfinished or path.suffix == PARTIAL) and path.name != name:
                delete_folder(path) if path.is_dir() else path.unlink()
        return name

    def save(
        self,
        step: int,
        state: Any,
        *,
        position: dict,
        config: dict,
        tokenizer: str | os.PathLike | None = None,
        measures: Mapping[str, float] | None = None,
        belongs_to: Mapping[str, Any] | None = None,
    ) -> None:
        """Start to save `state` (any tree of arrays); returns when it may be changed again.

        Args:
            step: names the checkpoint.
            position: state of the data iterator, as JSON values.
            config: the run's configuration, as JSON values.
            tokenizer: folder with the tokenizer's files.
            measures: validation results of this very state; say which checkpoint is best.
            belongs_to: what else must be the same where it is restored, by name, as JSON values.

        Raises:
            InputError: this save or the one before could not be written.
        """
        self.wait()
        partial = self.path(step) if in_bucket(self.folder) else self.path(step).with_suffix(PARTIAL)
        try:
            if self._primary:
                _delete(partial)
                partial.mkdir()
                _write_json(partial / "config.json", config)
                _write_json(partial / "position.json", position)
                if tokenizer is not None:
                    copy_tokenizer(locate(tokenizer), partial / "tokenizer")
                about = {
                    "step": step,
                    "measures": dict(measures or {}),
                    "leaves": shapes(state),
                    "belongs_to": dict(belongs_to or {}),
                }
                _write_json(partial / "about.json", about)
            distributed.wait_for_all()
            with told(partial), saving_options():
                response = ocp.save_async(os.fspath(partial / "state"), nested(state))
        except Exception as error:
            raise self._explain(error) from error
        self._thread = threading.Thread(target=self._finish, args=(step, partial, response))
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save that runs, if any.

        Raises:
            InputError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the background, without waiting."""
        if self._lock is not None:
            self._lock.check()
        error, self._error = self._error, None
        if error is not None:
            raise self._explain(error) from error

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(int(path.name) for path in self.folder.iterdir() if _is_complete(path))

    def measures(self, step: int) -> dict[str, float]:
        """Validation results of a checkpoint; none if it is damaged."""
        try:
            return _read_json(self.path(step) / "about.json")["measures"]
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def best(self) -> int | None:
        """The step with the highest `config.best`, if any was measured."""
        return next(iter(self._ranked(self.steps())), None)

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def restore(
        self, abstract: Any, step: int | None = None, belongs_to: Mapping[str, Any] | None = None
    ) -> Restored | None:
        """Load the newest undamaged checkpoint, or that of a step; None if there is none.

        Args:
            abstract: the state's tree with shape, dtype and sharding in place of arrays; the mesh may be
                another than the one that saved.
            step: which; None is the newest undamaged one.
            belongs_to: as given to `save`.

        Raises:
            InputError: the checkpoint is of another model or optimiser, or damaged (all of them, if no step
                is asked for).
        """
        undamaged = distributed.first_says(lambda: self._undamaged(step))
        return None if undamaged is None else self._load(undamaged, abstract, dict(belongs_to or {}))

    def _undamaged(self, step: int | None) -> int | None:
        """The step, or that of the newest undamaged checkpoint; None if there is no checkpoint."""
        steps = self.steps() if step is None else [step]
        for candidate in reversed(steps):
            damage = find_damage(self.path(candidate))
            if not damage:
                return candidate
            if step is not None:
                others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
                raise InputError(
                    f"{self.path(step)} is damaged: {damage}; take another one (there are {others})."
                )
            logger.warning("Checkpoint %s is damaged: %s.", self.path(candidate), damage)
            self._damaged.add(candidate)
        if steps:
            raise InputError(
                f"There is no undamaged checkpoint in {self.folder} ({', '.join(map(str, steps))} tried); "
                "delete them to start from the beginning."
            )
        return None

    def _load(self, step: int, abstract: Any, belongs_to: dict) -> Restored:
        path = self.path(step)
        about, leaves = _read_json(path / "about.json"), shapes(abstract)
        belongs_to = json.loads(json.dumps(belongs_to))  # tuples become lists, as they did there
        for stored, wanted in ((about["leaves"], leaves), (about["belongs_to"], belongs_to)):
            for name in [*wanted, *stored]:
                there, here = stored.get(name, "missing"), wanted.get(name, "missing")
                if there != here:
                    raise InputError(
                        f"{path} was saved by another model, adapter or optimiser: {name} is {there} there "
                        f"and {here} here; resume with the configuration in its config.json and the weights "
                        "it started from, or choose another run folder."
                    )
        with told(path):
            loaded = leaves_by_name(ocp.load(os.fspath(path / "state"), nested(abstract)))
        state = jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in leaves])
        return Restored(state, _read_json(path / "position.json"), step, _read_json(path / "config.json"))

    def _finish(self, step: int, partial: Path, response) -> None:
        try:
            with told(partial):
                response.result()
            if self._primary:
                _write_json(partial / MANIFEST, {"files": digests(partial)})
                if partial != self.path(step):
                    delete_folder(self.path(step))
                    os.replace(partial, self.path(step))
                self._damaged.discard(step)
                self._prune(step)
        except BaseException as error:
            self._error = error
            if self._primary:
                with contextlib.suppress(OSError, BucketError):  # what went wrong first is what counts
                    delete_folder(partial)

    def _ranked(self, steps: Iterable[int]) -> list[int]:
        """The undamaged among these steps that were measured by `config.best`, best first."""
        values = {step: self.measures(step).get(self.config.best) for step in set(steps) - self._damaged}
        measured = [step for step, value in values.items() if value is not None]
        return sorted(measured, key=lambda step: (values[step], step), reverse=True)

    def _prune(self, saved: int) -> None:
        """Delete what is neither among the newest nor among the best, up to the step just saved.

        Later ones were passed over when the run went on: they stay, uncounted, until it gets there again.
        """
        steps = [step for step in self.steps() if step <= saved]
        newest = [step for step in steps if step not in self._damaged][-self.config.keep_last :]
        keep = {*newest, *self._ranked(steps)[: self.config.keep_best]}
        for step in set(steps) - keep:
            _delete(self.path(step))

    def _explain(self, error: BaseException) -> BaseException:
        text = str(error)
        if getattr(error, "errno", None) in NO_SPACE or "No space left" in text:
            steps = [step for step in self.steps() if step not in self._damaged]
            kept = f"checkpoint {steps[-1]} is intact" if steps else "there is no checkpoint yet"
            return InputError(f"The disk of {self.folder} is full ({kept}); free some space and run again.")
        return error


def _is_complete(path: Path) -> bool:
    """Whether something in the folder of checkpoints is one, damaged or not."""
    return path.name.isdigit() and (not in_bucket(path) or (path / MANIFEST).exists())


def _delete(path: Path) -> None:
    """Delete a checkpoint; out of sight first: a half-deleted one must not look like a damaged one."""
    if in_bucket(path):
        (path / MANIFEST).unlink(missing_ok=True)
    elif path.exists() and path.suffix != PARTIAL:
        path = path.rename(path.with_suffix(PARTIAL))
    delete_folder(path)


def _appears(path: Path) -> bool:
    """Whether a file is there, after the time that networks take to show it."""
    for _ in range(60):
        if path.exists():
            return True
        time.sleep(0.5)
    return False


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the slash-joined names of the fields that lead to them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def nested(tree: Any) -> dict:
    """A tree of any containers as nested dictionaries, which mean the same to every version of Orbax."""
    result: dict = {}
    for name, leaf in leaves_by_name(tree).items():
        *parents, last = name.split("/")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return result


def shapes(tree: Any) -> dict[str, list]:
    """Shape and dtype of every leaf by name, as JSON values."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves_by_name(tree).items()}


def digests(folder: Path) -> dict[str, list]:
    """Size and checksum of every file below a folder: its sha256, or what a bucket knows without reading."""
    if in_bucket(folder):
        return {name: [entry["size"], _checksum(entry)] for name, entry in folder.walk_files().items()}
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def digest(path: Path) -> list:
        with path.open("rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]

    with ThreadPoolExecutor(4) as pool:
        return dict(
            zip((str(path.relative_to(folder)) for path in files), pool.map(digest, files), strict=True)
        )


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None.

    Of a checkpoint that was copied from a bucket to a disk, or the other way, the sizes are compared: each
    names other checksums.
    """
    try:
        expected = dict(_read_json(checkpoint / MANIFEST)["files"])
        found = digests(checkpoint)
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"manifest.json cannot be used ({error!r})"
    if "about.json" not in expected:
        return "manifest.json does not list about.json"
    changed = (name for name in expected if not _same(found.get(name), expected[name]))
    return next((f"{name} has changed" for name in changed), None)


def _checksum(entry: Mapping[str, Any]) -> str:
    """Of a file in a bucket: Google's checksum, or Amazon's ETag, which changes with the content."""
    return f"crc32c {entry['crc32c']}" if "crc32c" in entry else f"etag {entry['ETag']}"


def _same(found: list | None, expected: list) -> bool:
    if found is None or found[0] != expected[0]:
        return False
    kinds = {checksum.rpartition(" ")[0] for checksum in (found[1], expected[1])}  # none for a sha256
    return found[1] == expected[1] or len(kinds) > 1


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
