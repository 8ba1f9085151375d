"""Repositories of the Hugging Face hub: whole files at one commit, from the cache where they are, in bounded time."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from modeling.errors import UserError

ANSWER_SECONDS = (
    5  # a request without an answer for so long has failed; HF_HUB_DOWNLOAD_TIMEOUT decides otherwise
)
QUIET_ANSWERS = 5  # when for so many times that there was no answer, this process goes offline
RETRY_WAITS = (1, 2, 4)  # seconds
WAYS_OUT = {
    "dataset": "give --dataset digits or a local folder (there is none of that name here)",
    "model": "give --weights FILE.safetensors, or --weights none for random ones",
}
_heard = 0.0  # when the hub last answered


def download(
    repo_id: str, *, repo_type: str, revision: str | None = None, files: list[str] | None = None
) -> Path:
    """The folder of a repository's files (all, or those of the patterns) at one commit, whose hash is the folder's name.

    repo_type: "dataset" or "model"; revision: a branch, tag or commit, by default main. What is cached is not fetched again; with
    the hub gone, or HF_HUB_OFFLINE set, the cache answers alone. Of several processes one downloads and the others wait for its
    lock, outside of any collective. UserError: it cannot be had, with the reason and the ways out.
    """
    options = dict(repo_type=repo_type, revision=revision, allow_patterns=files)
    error: Exception | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            with (
                _impatient(),
                WeakFileLock(
                    Path(constants.HF_HUB_CACHE) / f".{repo_type}s--{repo_id.replace('/', '--')}.lock"
                ),
            ):
                return Path(_with_retries(repo_id, **options))
        except errors.HFValidationError as failure:
            raise UserError(f"{repo_type} {repo_id!r} is no name of the hub, such as owner/name") from failure
        except (httpx2.HTTPError, OSError) as failure:
            error = failure
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, **options, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        if getattr(error, "errno", None):  # the disk's, not the hub's
            raise error from None
        name = f"{repo_type} {repo_id}{f'@{revision}' if revision else ''}"
        network = (
            "check the network and HF_TOKEN, set HF_HUB_OFFLINE=1 to use what is cached"
            if error
            else "unset it to download"
        )
        raise UserError(
            f"{name} cannot be had from the hub: {_reason(error)}; {network}, or {WAYS_OUT[repo_type]}"
        ) from error


def _with_retries(repo_id: str, **options) -> str:
    for wait in (*RETRY_WAITS, None):
        try:
            return huggingface_hub.snapshot_download(
                repo_id, **options, etag_timeout=_answer_seconds(), tqdm_class=_Bar
            )
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except (httpx2.TimeoutException, httpx2.RemoteProtocolError):
            raise  # while a file was read, and after five tries of the library's own
        except (httpx2.HTTPError, OSError) as error:
            lasting = isinstance(error.__cause__ or error, (errors.OfflineModeIsEnabled, httpx2.ConnectError))
            if wait is None or lasting or getattr(error, "errno", None) or _is_quiet():
                raise
        time.sleep(wait)
    raise AssertionError


def _answer_seconds() -> float:
    return float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or ANSWER_SECONDS)


def _is_quiet() -> bool:
    return time.monotonic() - _heard > QUIET_ANSWERS * _answer_seconds()


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Give each request of the library ANSWER_SECONDS in this block; after QUIET_ANSWERS times that in silence, go offline.

    The library's own client gets two hooks, and loses them at the end. Files come over plain HTTP, which resumes a download
    where it was cut; xet has limits of its own.
    """
    global _heard
    _heard = time.monotonic()
    huggingface_hub.utils.logging.set_verbosity_error()
    constants.HF_HUB_DISABLE_XET = True

    def limit(request) -> None:
        if _is_quiet():
            constants.HF_HUB_OFFLINE = True
            raise errors.OfflineModeIsEnabled("the hub does not answer")
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), _answer_seconds())

    def listen(response) -> None:
        global _heard
        _heard = time.monotonic()

    client = huggingface_hub.get_session()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks.get("request", []), limit],
        "response": [*hooks.get("response", []), listen],
    }
    try:
        yield
    finally:
        client.event_hooks = hooks


class _Bar(tqdm):
    """Of the library's three bars the one of bytes, on a terminal, where the download takes more than a second."""

    def __init__(self, *args, **kwargs):
        of_bytes = str(kwargs.get("desc")).startswith("Reconstructing")
        kwargs |= dict(
            disable=not (of_bytes and sys.stderr.isatty()),
            bar_format=None,
            desc="downloading",
            delay=1,
            dynamic_ncols=True,
        )
        super().__init__(*args, **kwargs)

    def update(self, n: float | None = 1) -> None:
        global _heard
        _heard = time.monotonic()
        super().update(n)

    def set_description(self, *args, **kwargs) -> None:
        """The library would say that it reconstructs."""


def _reason(error: Exception | None) -> str:
    cause = error if isinstance(error, errors.HfHubHTTPError) else getattr(error, "__cause__", None) or error
    if cause is None:
        return "HF_HUB_OFFLINE is set, and not all of it is cached"
    if isinstance(cause, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        return f"the hub answered {status}" + (
            ", so there is none of that name, or it needs a token" if status in (401, 403, 404) else ""
        )
    if isinstance(cause, (httpx2.TimeoutException, errors.OfflineModeIsEnabled)):
        return "the hub does not answer"
    if isinstance(cause, httpx2.ConnectError):
        return "the hub cannot be reached"
    return f"{cause}".strip().split("\n")[0] or type(cause).__name__
