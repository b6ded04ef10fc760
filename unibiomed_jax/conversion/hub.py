"""Checkpoints on the Hugging Face hub: from `owner/name[@revision]` to a folder of downloaded files.

huggingface_hub does the work: HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean here what they mean
everywhere. Weights are fetched as safetensors alone, never as pickles; the code of a release comes along for
the way back to it, as text that nothing executes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from unibiomed_jax.checkpoint import is_checkpoint
from unibiomed_jax.conversion.reading import INDEX
from unibiomed_jax.errors import DiskFullError, InputError
from unibiomed_jax.files import NO_SPACE, locate
from unibiomed_jax.inputs.tokenizer import FILES as TOKENIZER_FILES

# huggingface_hub is imported where it is called: it takes a second, and reads its environment while it does.

# What conversion reads of a release, and what a converted checkpoint consists of (see `checkpoint`).
FILES = (
    *("config.json", "generation_config.json", INDEX, "*.safetensors", "*.py", *TOKENIZER_FILES),
    *("manifest.json", "params/*", "tokenizer/*", "release/*"),
)
# A star matches across folders, but weights in a folder below are not the model's: adapters, exports.
OTHER_FILES = ("*/*.safetensors",)

_SOURCE = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at one of its revisions."""

    # owner/name
    name: str
    # A branch, a tag or a commit; None: the main branch.
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class Revision:
    """What a revision stands for now."""

    commit: str
    # Why the hub did not say so, and the last answer that is in the cache stands for it; None: it did.
    unreachable: BaseException | None = None


def repository(source: str | os.PathLike) -> Repository | None:
    """The repository that a text names; None for a path: whatever exists, or has not the form of a name."""
    match = _SOURCE.fullmatch(source) if isinstance(source, str) else None
    if match is None or Path(source).exists():
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(match[1])
    except HFValidationError:
        return None
    return Repository(match[1], match[2])


def local(source: str | os.PathLike) -> Path:
    """The folder or file that `source` names, or the downloaded files of the repository that it names.

    Raises:
        InputError: the repository cannot be downloaded.
    """
    named = repository(source)
    return download(named, resolve(named)) if named else locate(source)


def resolve(repository: Repository) -> Revision:
    """Look up the commit of a revision: at the hub or, where that cannot be reached, in the cache.

    Raises:
        InputError: there is no such repository or revision, or neither knows it.
    """
    from huggingface_hub import HfApi, constants

    if repository.revision and _COMMIT.fullmatch(repository.revision):
        return Revision(repository.revision)
    api, unreachable = HfApi(endpoint=_endpoint()), None
    try:
        # With a limit of time, which HfApi.resolve_revision has not: a firewall may swallow every packet.
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        commit = api.model_info(repository.name, revision=repository.revision, timeout=timeout).sha
    except Exception as error:  # of httpx in the main, by another name in every major version
        if refusal := _refusal(repository, error):
            raise refusal from None
        unreachable = error
        try:
            known = api.resolve_revision(repository.name, revision=repository.revision, local_files_only=True)
        except Exception:
            raise _unreachable(repository, error) from None
        commit = known.resolved
    return Revision(_checked(repository, commit), unreachable)


def _checked(repository: Repository, commit: str | None) -> str:
    """The commit, which names folders."""
    if commit is None or not _COMMIT.fullmatch(commit):
        raise InputError(
            f"{_endpoint()} gives {repository} the commit {commit!r}, which is none; check HF_ENDPOINT."
        )
    return commit


def download(repository: Repository, revision: Revision) -> Path:
    """Bring the files of a repository into the cache of huggingface_hub, unless they are there.

    Returns:
        Their folder, which has the name of the commit.

    Raises:
        InputError: they cannot be had, in full, or the weights among them are no safetensors.
        DiskFullError: the disk is full.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repository.name,
                revision=repository.revision,
                endpoint=_endpoint(),
                allow_patterns=list(FILES),
                ignore_patterns=list(OTHER_FILES),
                local_files_only=revision.unreachable is not None,
            )
        )
    except Exception as error:
        raise _sentence(repository, revision, error) from None
    _checked(repository, folder.name)
    if not is_checkpoint(folder) and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{repository} holds no safetensors, and weights of another kind, such as pytorch_model.bin, are "
            "never downloaded: they are pickles, which can run code; ask its owner for safetensors."
        )
    return folder


def _endpoint() -> str:
    """The address of the hub, as the environment has it now and not when huggingface_hub was imported."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


# ------------------------------------------------------------------------------------------------------------
# Sentences. Neither they nor the traceback of an InputError repeat what a server said or what was sent to it:
# an address can hold a signature, an answer anything, and a complaint about a header the token.


def _sentence(repository: Repository, revision: Revision, error: Exception) -> InputError:
    """What to tell the user of an error of a download."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    # A file that neither the hub gives nor the cache has: the first reason says more.
    cause = (error.__cause__ or error) if isinstance(error, LocalEntryNotFoundError) else error
    if refusal := _refusal(repository, cause):
        return refusal
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return _unreachable(repository, revision.unreachable or cause)
    cache = constants.HF_HUB_CACHE
    if getattr(error, "errno", None) in NO_SPACE or "No space left on device" in str(error):
        return DiskFullError(
            f"The disk of {cache} is full; free some space, or choose another disk by HF_HOME, and run again."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return InputError(
            f"{error.filename} cannot be written ({error.strerror}); mend that, or set HF_HOME to a folder "
            "that can be."
        )
    return InputError(
        f"The download of {repository} from {_endpoint()} broke off ({_reason(error)}); run the same again: "
        "files that are complete are kept."
    )


def _refusal(repository: Repository, error: BaseException) -> InputError | None:
    """What to tell the user where to ask again would not help; None for any other error."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = _endpoint()
    if isinstance(error, GatedRepoError):
        return InputError(
            f"{repository} is gated: ask for access at {hub}/{repository.name}, then set HF_TOKEN to a token "
            "of yours, or run `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"{repository} is no folder here and no repository that {hub} would show you; check the name or, "
            "if it is private, set HF_TOKEN or run `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(
            f"{repository.name} has no revision {repository.revision or 'main'!r}; give a branch, a tag or a "
            "whole commit."
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status in (401, 403):
        return InputError(
            f"{hub} refuses {repository} ({status}); set HF_TOKEN to a token that may read it, or unset one "
            "that is no longer valid."
        )
    if 400 <= status < 500 and status not in (408, 429):  # which mean: not now
        return InputError(f"{hub} does not know {repository} ({status}); check HF_ENDPOINT, and the name.")
    if not status and (isinstance(error, UnicodeEncodeError) or "Bearer" in str(error)):
        return InputError(
            "The token that is set, in HF_TOKEN or by `hf auth login`, cannot be sent: it holds characters "
            "that no token has; set it again."
        )
    return None


def _unreachable(repository: Repository, error: BaseException) -> InputError:
    """What to tell the user where only the cache could be asked, and does not have it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return InputError(
            f"{repository} is no folder here and not complete in {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE forbids to fetch it; unset that once, or check the name."
        )
    return InputError(
        f"{repository} is no folder here and not complete in {constants.HF_HUB_CACHE}, and {_endpoint()} "
        f"cannot be reached ({_reason(error)}); check the name and the network, or try again later."
    )


def _reason(error: BaseException) -> str:
    """Why, in a few words."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"it answers {response.status_code}"
    words = (str(error).strip().splitlines() or [""])[0]
    return type(error).__name__ if not words or "://" in words else words[:150]
