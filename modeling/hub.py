"""Download datasets and models from the Hugging Face hub, or take them from its cache, in bounded time."""

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

# A request fails after this many seconds without an answer. HF_HUB_DOWNLOAD_TIMEOUT overrides it.
ANSWER_SECONDS = 5
# The hub is given up when requests have had no answer for this many times that limit.
QUIET_ANSWERS = 5
RETRY_WAITS = (1, 2, 4)  # seconds between the tries
WAYS_OUT = {
    "dataset": "give --dataset digits or a local folder (no folder has this name)",
    "model": "give --weights FILE.safetensors, or --weights none for random ones",
}
_is_command = False  # inside one_command()
_gave_up = False  # the hub was silent: this command asks it no more
_waiting_since: float | None = None  # time.monotonic() of the first request since the hub last answered


@contextlib.contextmanager
def one_command() -> Iterator[None]:
    """In this block a hub that was silent once is not asked again. Afterwards it is."""
    global _is_command, _gave_up
    was_command, _is_command = _is_command, True
    try:
        yield
    finally:
        _is_command = was_command
        _gave_up = _gave_up and was_command


def download(
    repo_id: str, *, repo_type: str, revision: str | None = None, files: list[str] | None = None
) -> Path:
    """Return a folder with a repository's files at one commit. The folder's name is the commit's hash.

    repo_type is "dataset" or "model". revision is a branch, tag or commit; None means main. files are
    patterns such as "*.json"; None means all files. Cached files are not downloaded again. Only the cache is
    used when the hub does not answer or HF_HUB_OFFLINE is set. One process downloads; the others wait for its
    file lock, not in a collective operation, which could time out. UserError: the files are not available.
    """
    try:
        with one_command():
            return _download(repo_id, repo_type=repo_type, revision=revision, files=files)
    except errors.HFValidationError as failure:
        raise UserError(f"{repo_type} {repo_id!r} is not a hub name like owner/name") from failure


def _download(repo_id: str, *, repo_type: str, revision: str | None, files: list[str] | None) -> Path:
    error: Exception | None = None
    if _gave_up:
        error = errors.OfflineModeIsEnabled("the hub did not answer before")
    elif not constants.HF_HUB_OFFLINE:
        lock = Path(constants.HF_HUB_CACHE) / f".{repo_type}s--{repo_id.replace('/', '--')}.lock"
        try:
            with _impatient(), WeakFileLock(lock):
                return Path(_with_retries(repo_id, repo_type=repo_type, revision=revision, files=files))
        except (httpx2.HTTPError, OSError) as failure:
            error = failure
    try:
        cached = huggingface_hub.snapshot_download(
            repo_id,
            repo_type=repo_type,
            revision=revision,
            allow_patterns=files,
            local_files_only=True,
        )
        return Path(cached)
    except errors.LocalEntryNotFoundError:
        if getattr(error, "errno", None):  # the disk failed, not the hub
            raise error from None
        name = f"{repo_type} {repo_id}{f'@{revision}' if revision else ''}"
        network = (
            "check the network and HF_TOKEN, set HF_HUB_OFFLINE=1 to use what is cached"
            if error
            else "unset it to download"
        )
        raise UserError(
            f"{name} is not available from the hub: {_reason(error)}; {network}, or {WAYS_OUT[repo_type]}"
        ) from error


def _with_retries(repo_id: str, *, repo_type: str, revision: str | None, files: list[str] | None) -> str:
    """Download, and try again after an error that may pass. Return the folder's path."""
    for wait in (*RETRY_WAITS, None):
        try:
            return huggingface_hub.snapshot_download(
                repo_id,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=files,
                etag_timeout=_answer_seconds(),
                tqdm_class=_Bar,
            )
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except (httpx2.TimeoutException, httpx2.RemoteProtocolError):
            raise  # a file's transfer failed, and the library itself has already tried five times
        except (httpx2.HTTPError, OSError) as error:
            lasting = isinstance(error.__cause__ or error, (errors.OfflineModeIsEnabled, httpx2.ConnectError))
            if wait is None or lasting or getattr(error, "errno", None) or _is_quiet():
                raise
        time.sleep(wait)
    raise AssertionError


def _answer_seconds() -> float:
    return float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or ANSWER_SECONDS)


def _is_quiet() -> bool:
    if _waiting_since is None:
        return False
    return time.monotonic() - _waiting_since > QUIET_ANSWERS * _answer_seconds()


def _hear() -> None:
    global _waiting_since
    _waiting_since = None


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Limit how long the library waits for the hub inside this block.

    Each request may wait ANSWER_SECONDS. After QUIET_ANSWERS times that long without any answer, the hub is
    given up. The limits are two hooks on the library's client. Files come over plain HTTP, which resumes an
    interrupted download: these limits do not reach the xet protocol. At the end the library is as it was.
    """
    _hear()
    verbosity = huggingface_hub.utils.logging.get_verbosity()
    is_xet_off = constants.HF_HUB_DISABLE_XET
    huggingface_hub.utils.logging.set_verbosity_error()
    constants.HF_HUB_DISABLE_XET = True

    def limit(request) -> None:
        global _gave_up, _waiting_since
        if _is_quiet():
            _gave_up = True
            raise errors.OfflineModeIsEnabled("the hub does not answer")
        if _waiting_since is None:
            _waiting_since = time.monotonic()
        seconds = _answer_seconds()
        request.extensions["timeout"] = {
            "connect": seconds,
            "read": seconds,
            "write": seconds,
            "pool": seconds,
        }

    client = huggingface_hub.get_session()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks.get("request", []), limit],
        "response": [*hooks.get("response", []), lambda response: _hear()],
    }
    try:
        yield
    finally:
        client.event_hooks = hooks
        constants.HF_HUB_DISABLE_XET = is_xet_off
        huggingface_hub.utils.logging.set_verbosity(verbosity)


class _Bar(tqdm):
    """Show one of the library's three progress bars: the bytes, on a terminal, after the first second.

    The library chooses the other arguments. They are passed on to tqdm unchanged.
    """

    def __init__(self, *args, **kwargs):
        of_bytes = str(kwargs.get("desc")).startswith("Reconstructing")
        kwargs["disable"] = not (of_bytes and sys.stderr.isatty())
        kwargs["bar_format"] = None
        kwargs["desc"] = "downloading"
        kwargs["delay"] = 1
        kwargs["dynamic_ncols"] = True
        super().__init__(*args, **kwargs)

    def update(self, n: float | None = 1) -> None:
        _hear()
        super().update(n)

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """Keep our description: the library would change it to "Reconstructing"."""


def _reason(error: Exception | None) -> str:
    """Say in a few words why a download failed. None: the hub was not asked."""
    cause = error if isinstance(error, errors.HfHubHTTPError) else getattr(error, "__cause__", None) or error
    if cause is None:
        return "HF_HUB_OFFLINE is set, and some of its files are not cached"
    if isinstance(cause, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        return f"the hub answered {status}" + (
            ", so the name does not exist or needs a token" if status in (401, 403, 404) else ""
        )
    if isinstance(cause, (httpx2.TimeoutException, errors.OfflineModeIsEnabled)):
        return "the hub does not answer"
    if isinstance(cause, httpx2.ConnectError):
        return "the hub cannot be reached"
    return f"{cause}".strip().split("\n")[0] or type(cause).__name__
