"""The Hub: repositories and uploads that are tried again, and that say what to do where they fail."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..texts import redacted, without_secrets


__all__ = ["PushError", "create_repository", "failures_in_log", "push_command", "remote_card", "upload"]

PAUSES = (5.0, 30.0)  # seconds before the second and the third try; the client itself tries requests again, too
TRIED_AGAIN = (408, 409, 425, 429)  # statuses that another try may change; 409: somebody else has just committed

logger = logging.getLogger(__name__)
T = TypeVar("T")


class PushError(RuntimeError):
    """Something could not be pushed to the Hub. What is on the disk is whole, and the message says how to push it."""


@contextmanager
def failures_in_log() -> Iterator[None]:
    """A push that fails inside ends nothing else: the log says what failed, and how to push it later."""
    try:
        yield
    except PushError as error:
        logger.error("%s", error)


def create_repository(name: str, token: str | None, private: bool | None, revision: str | None) -> str:
    """Have a model repository, made if it does not exist, with the branch `revision`; returns its full id.

    Raises:
        ValueError: a name that cannot be one, or a token that may not write there.
        PushError: a Hub that does not answer.
    """
    api = HfApi(token=token)
    try:
        repo = _retrying(
            f"Creating {name!r}", lambda: api.create_repo(name, private=private, exist_ok=True).repo_id, token
        )
        if revision is not None:
            _retrying(f"Creating {revision!r}", lambda: api.create_branch(repo, branch=revision, exist_ok=True), token)
    except HFValidationError as error:
        raise ValueError(f"`hub_model_id` {name!r} is not the name of a repository: {error}") from error
    except Exception as error:
        if _status(error) in (401, 403):
            raise ValueError(
                f"`push_to_hub` is on, but the Hub refuses to write to {name!r} ({_text(error, token)}). Log in with an "
                "account that may: `hf auth login`, or a token with write access in HF_TOKEN."
            ) from without_secrets(error, token)
        raise PushError(f"The repository {name!r} could not be made: {_text(error, token)}") from without_secrets(
            error, token
        )
    return repo


def upload(
    repo: str,
    files: Iterable[Path],
    message: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    folder: str = "",
) -> CommitInfo:
    """Commit files to a repository, under their names in `folder`. What was sent before a failure is not sent again.

    Raises:
        PushError: it failed for good.
    """
    operations = [CommitOperationAdd(folder + file.name, file) for file in files]
    api = HfApi(token=token)
    try:
        return _retrying(
            f"Pushing to {repo!r}",
            lambda: api.create_commit(repo, operations, commit_message=message, revision=revision),
            token,
        )
    except Exception as error:
        raise PushError(f"Pushing to {repo!r} failed: {_text(error, token)}") from without_secrets(error, token)


def push_command(repo: str, folder: str | Path, names: Iterable[str], private: Any, revision: str | None) -> str:
    """The command that pushes files of a folder later."""
    words = ["hf", "upload", repo, str(folder), "."]
    for name in names:
        words += ["--include", name]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    return shlex.join(words)


def remote_card(repo: str, token: str | None, revision: str | None) -> str | None:
    """The text of a repository's card as it is now; None where it has none.

    Raises:
        PushError: the Hub does not say: then nobody knows what a push would write over.
    """
    api = HfApi(token=token)

    def read() -> str | None:
        try:
            file = api.hf_hub_download(repo, "README.md", revision=revision, force_download=True)
        except LocalEntryNotFoundError:  # no answer, and nothing kept of an earlier one
            raise
        except EntryNotFoundError:
            return None
        return Path(file).read_text(encoding="utf-8")

    try:
        return _retrying(f"Reading the card of {repo!r}", read, token)
    except Exception as error:
        told = _text(error, token)
        raise PushError(f"Pushing to {repo!r} failed, its card cannot be read: {told}") from without_secrets(
            error, token
        )


def _retrying(what: str, action: Callable[[], T], token: str | None) -> T:
    for pause in PAUSES:
        try:
            return action()
        except Exception as error:
            status = _status(error)
            if isinstance(error, HFValidationError) or (
                status is not None and status < 500 and status not in TRIED_AGAIN
            ):
                raise
            logger.warning("%s failed (%s); once more in %g s.", what, _text(error, token), pause)
            time.sleep(pause)
    return action()


def _status(error: Exception) -> int | None:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return None if response is None else response.status_code


def _text(error: Exception, token: str | None) -> str:
    return redacted(" ".join(str(error).split()) or repr(error), token)
