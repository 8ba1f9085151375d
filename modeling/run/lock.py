"""Lock files: only one process at a time may write the files of a run.

A lock file names its owner. A lock is stale if its owner has ended; then another process may take it over. On
the same machine /proc tells whether the owner still runs. Another machine or container cannot see this.
Therefore an owner renews its lock every few seconds, and a lock without renewal becomes stale after a while.
`flock`, if the file system has it, prevents two processes from taking over the same stale lock.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from modeling.errors import UserError
from modeling.run.files import RunFiles
from modeling.run.launch import on_main_process

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RENEW_SECONDS = 5.0
WATCH_SECONDS = 20.0  # a lock of another machine is stale after so long without renewal
LOOK_SECONDS = 0.1  # between two looks at a lock that may be stale


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    machine identifies a machine since its last boot, and its namespace of process numbers. ticks is the start
    of the process in ticks since that boot. So a later process with the same number is not mistaken for it.
    """

    host: str
    pid: int
    started: str
    machine: str
    ticks: str

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}, since {self.started}"

    def is_alive(self) -> bool | None:
        """Whether the owner still runs. None: this process cannot tell."""
        if not self.machine or self.machine != _machine():
            return None
        ticks = _start_ticks(self.pid)
        if not ticks and _is_of_another_user(self.pid):
            return None
        return ticks == self.ticks


class Lock:
    """A lock on the files that `description` names, such as "run 'cnn' in results".

    Each folder that holds such files has a lock file. `advice` says what to do if the lock is taken.
    """

    def __init__(self, paths: list[Path], *, description: str, advice: str):
        self.paths = paths
        self.description = description
        self.advice = advice
        self.content = b""
        self.taken: list[Path] = []
        self.made_folders: list[Path] = []
        self.has_ended = threading.Event()

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, or take over a stale one. UserError: another process holds it."""
        own_pid = os.getpid()
        owner = Owner(
            host=platform.node(),
            pid=own_pid,
            started=datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
            machine=_machine(),
            ticks=_start_ticks(own_pid),
        )
        self.content = json.dumps(dataclasses.asdict(owner)).encode()
        try:
            for path in self.paths:
                if not path.parent.exists():
                    self.made_folders.append(path.parent)
                self._take(path)
                self.taken.append(path)
        except BaseException:
            self.release()
            raise
        if self.taken:
            threading.Thread(target=self._renew, name="lock", daemon=True).start()

    def _take(self, path: Path) -> None:
        while not _create(path, self.content):
            found = _read(path)
            if found is None:  # its owner has just released it
                continue
            holder = _parse(found)
            is_alive = holder.is_alive() if holder else None
            if is_alive is None:
                is_alive = self._is_renewed(path, holder)
            if is_alive:
                who = holder or "another process"
                raise UserError(f"{self.description} is in use by {who}: {self.advice}")
            if _replace(path, found, self.content):
                return

    def _is_renewed(self, path: Path, holder: Owner | None) -> bool:
        """Watch a lock whose owner cannot be checked. True: that process, or another one, renews the lock."""
        print(
            f"{self.description} was in use by {holder or 'another process'}; "
            f"waiting {WATCH_SECONDS:.0f} s to see whether that process still runs",
            flush=True,
        )
        first = _version(path)
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
            now = _version(path)
            if now != first:
                return now is not None
        return False

    def _renew(self) -> None:
        """Renew the lock until it is released, so that other machines see that the owner still runs."""
        while not self.has_ended.wait(RENEW_SECONDS):
            for path in self.taken:
                with contextlib.suppress(OSError):
                    if _read(path) == self.content:
                        os.utime(path)

    def check(self) -> None:
        """UserError: another process took the lock over, for example while this one was suspended."""
        for path in self.taken:
            if _read(path) == self.content or _create(path, self.content):
                continue
            raise UserError(
                f"{self.description} was taken over by {_parse(_read(path) or b'') or 'another process'}: "
                "this process ends, and writes nothing more"
            )

    def release(self) -> None:
        """Release the lock. Remove the folders that it made, if they are still empty."""
        self.has_ended.set()
        for path in self.taken:
            with contextlib.suppress(OSError):
                if _read(path) == self.content:
                    path.unlink()
        for folder in self.made_folders:
            with contextlib.suppress(OSError):  # the folder holds files now
                folder.rmdir()
        self.taken = []
        self.made_folders = []


@contextlib.contextmanager
def hold_run(accelerator: Accelerator, run_files: RunFiles) -> Iterator[Lock]:
    """Hold the lock of a run's files. All processes call this; the main one takes the lock.

    UserError, on every process: another run holds the lock.
    """
    lock = Lock(
        run_files.locks if accelerator.is_main_process else [],
        description=f"run {run_files.run!r} in {run_files.output_dir}",
        advice="give another --run-name or --output-dir",
    )
    on_main_process(accelerator, lock.acquire)
    try:
        yield lock
    finally:
        lock.release()


def _create(path: Path, content: bytes) -> bool:
    """Create the file, and its folder if needed. False: the file exists already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    except FileNotFoundError:  # another process has just removed the folder
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return True


def _replace(path: Path, expected: bytes, content: bytes) -> bool:
    """Replace the file's content. False: another process changed it first."""
    try:
        with path.open("rb+") as file:
            if fcntl:
                with contextlib.suppress(OSError):  # this file system has no flock
                    fcntl.flock(file, fcntl.LOCK_EX)
            if file.read() != expected or _read(path) != expected:
                return False
            file.seek(0)
            file.write(content)
            file.truncate()
    except FileNotFoundError:
        return False
    return _read(path) == content


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _version(path: Path) -> tuple[int, int] | None:
    """Return a value that changes when the lock is renewed. None: there is no lock.

    Opening the file makes a network file system fetch its status anew.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _parse(content: bytes) -> Owner | None:
    """Read the owner from a lock's content. None: it is not a lock, or not completely written."""
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


@functools.cache
def _machine() -> str:
    """Identify this machine since its boot, and its namespace of process numbers. "": there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_ticks(pid: int) -> str:
    """Return the start of a process in ticks since the boot. "": the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _is_of_another_user(pid: int) -> bool:
    """Whether a process of another user has this number. /proc can hide such processes."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False
