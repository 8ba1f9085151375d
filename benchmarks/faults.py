"""Inject faults into the commands, and print a table: fault, outcome, whether that is what we promise.

    python benchmarks/faults.py              # all, some 10 minutes
    python benchmarks/faults.py disk owner   # those whose name has one of these words

The small disks and the read-only one are tmpfs mounts, which need root on Linux. A fault that cannot be
injected here says so. We promise: exit status 0, or one line on standard error that names the file or folder
and exit status 1 (2 if it can be known at the start); no half-written file; and the same command (train.py:
with --resume) ends as if nothing had happened, once the fault is gone.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_resume import assert_no_step_twice, assert_same_outcome  # noqa: E402

DATA = "--dataset digits --num-workers 0 --num-threads 1"
MODEL = f"train.py --model cnn_small --batch-size 32 {DATA}"
TRAIN = f"{MODEL} --limit-train 96 --limit-eval 40 --epochs 6 --ema 0.9"
LONG = f"{MODEL} --epochs 4 --checkpoint-every 5"
EXPORT = "export_data.py --dataset digits --num-workers 0"
PROFILE = "profile.py --models cnn_small --num-steps 3 --num-threads 1"
FAULTS: list[tuple[str, Callable[[], str]]] = []


class NotHereError(Exception):
    """This machine does not let us inject the fault."""


def fault(name: str, *arguments):
    """Put a function into the table, with its arguments. It returns the outcome, or fails an assertion."""

    def add(function):
        FAULTS.append((name, lambda: function(*arguments)))
        return function

    return add


# ---- Commands --------------------------------------------------------------------------------------------


def begin(command: str, folder: Path, *, processes: int = 1, **options) -> subprocess.Popen:
    launch = [sys.executable]
    if processes > 1:
        launch += f"-m torch.distributed.run --nproc-per-node={processes} --master-port=0".split()
    argv = [*launch, *command.split(), "--output-dir", str(folder)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(argv, cwd=ROOT, env=env, **streams, **options)


def finish(job: subprocess.Popen) -> SimpleNamespace:
    out, err = job.communicate(timeout=300)
    return SimpleNamespace(status=job.returncode, out=out, err=err)


def run(command: str, folder: Path, **options) -> SimpleNamespace:
    return finish(begin(command, folder, **options))


def succeeds(command: str, folder: Path, **options) -> SimpleNamespace:
    result = run(command, folder, **options)
    assert result.status == 0, f"exit {result.status}: {result.err[-300:]}"
    return result


def one_line(result: SimpleNamespace, folder: Path, *words: str) -> str:
    """The error line, after checking that there is one, which names a file, and that no temporary is left."""
    lines = [line for line in result.err.splitlines() if "error: " in line]
    assert result.status in (1, 2) and len(lines) == 1, f"exit {result.status}: {result.err[-300:]}"
    assert "Traceback" not in result.err, result.err[-300:]
    assert all(word in lines[0] for word in words), lines[0]
    left = [path.name for path in folder.rglob("*.tmp*")] if folder.is_dir() else []
    assert not left, f"left: {left}"
    return f"exit {result.status}, {lines[0].partition('error: ')[2].replace(str(folder), 'OUT')[:90]}"


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def has_state(folder: Path) -> bool:
    return any((folder / "checkpoints" / "cnn_small_state").glob("step_*.safetensors"))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def disk(options: str) -> Iterator[Path]:
    """A small disk with these mount options."""
    folder = Path(tempfile.mkdtemp(dir=PLACE.name))
    mount(options, folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def mount(options: str, folder: Path) -> None:
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        raise NotHereError("mounting a tmpfs needs root")


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=PLACE.name)) / "out"


def same_as(command: str, folder: Path) -> str:
    """Resume or repeat the run, and compare it with one that met no fault."""
    if command not in REFERENCES:
        REFERENCES[command] = new_folder()
        succeeds(command, REFERENCES[command])
    succeeds(f"{command} --resume", folder)
    assert_same_outcome(folder, REFERENCES[command])
    assert_no_step_twice(folder)
    return "resumed: equal"


# ---- The table -------------------------------------------------------------------------------------------

for size in ("64k", "1m", "4m", "9m", "12m"):

    @fault(f"disk of {size} is full while train.py writes", size)
    def _(size: str) -> str:
        with disk(f"size={size}") as folder:
            text = one_line(run(TRAIN, folder / "out"), folder / "out", str(folder))
            mount("remount,size=100m", folder)
            return f"{text}; {same_as(TRAIN, folder / 'out')}"


for name, size in (("runs", "64k"), ("runs", "16k"), ("checkpoints", "3m")):

    @fault(f"disk of {size} under {name}/ is full while train.py writes", name, size)
    def _(name: str, size: str) -> str:
        folder = new_folder()
        with disk(f"size={size}") as small:
            folder.mkdir()
            (folder / name).symlink_to(small)
            result = run(TRAIN, folder)
            text = one_line(result, folder, str(folder)) if result.status else "exit 0"
            mount("remount,size=100m", small)
            return f"{text}; {same_as(TRAIN, folder)}"


for command, size in ((EXPORT, "200k"), (PROFILE, "16k"), (PROFILE, "200k")):

    @fault(f"disk of {size} is full while {command.split()[0]} writes", command, size)
    def _(command: str, size: str) -> str:
        with disk(f"size={size}") as folder:
            text = one_line(run(command, folder / "out"), folder / "out", str(folder))
            empty = [path.name for path in folder.rglob("*") if path.is_file() and not path.stat().st_size]
            assert not empty, f"empty: {empty}"
            mount("remount,size=100m", folder)
            succeeds(command, folder / "out")
            return f"{text}; again: whole"


@fault("files may have 1 MB (RLIMIT_FSIZE), train.py")
def _() -> str:
    folder = new_folder()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))  # noqa: E731
    text = one_line(run(TRAIN, folder, preexec_fn=limit), folder, "File too large", str(folder))
    return f"{text}; {same_as(TRAIN, folder)}"


for command in (TRAIN, EXPORT, PROFILE):

    @fault(f"read-only disk, {command.split()[0]}", command)
    def _(command: str) -> str:
        with disk("ro") as folder:
            result = run(command, folder / "out")
            assert result.status == 2, result.status
            return one_line(result, folder, str(folder))


for name in ("checkpoints", "runs"):

    @fault(f"another disk under {name}/, train.py twice", name)
    def _(name: str) -> str:
        folder = new_folder()
        with disk("size=100m") as other:
            folder.mkdir()
            (folder / name).symlink_to(other)
            succeeds(TRAIN, folder)
            second = succeeds(TRAIN, folder)
            assert "The files of an older run" in second.out, second.out
            return f"exit 0, exit 0; {same_as(TRAIN, folder)}"


for seconds in (0.0, 0.2, 0.5):

    @fault(f"train.py is killed {seconds} s after a state", seconds)
    def _(seconds: float) -> str:
        folder = new_folder()
        job = begin(LONG, folder)
        wait_for(lambda: has_state(folder))
        time.sleep(seconds)
        job.kill()
        finish(job)
        return same_as(LONG, folder)


@fault("export_data.py is killed")
def _() -> str:
    folder = new_folder()
    job = begin(EXPORT, folder)
    wait_for(lambda: len([*folder.glob("train/*/*.png")]) > 100)
    job.kill()
    finish(job)
    succeeds(EXPORT, folder)
    succeeds(f"{EXPORT} --verify", folder)
    return "again: whole"


@fault("a rank is killed, of two")
def _() -> str:
    folder = new_folder()
    job = begin(LONG, folder, processes=2)
    wait_for(lambda: has_state(folder))
    started = time.monotonic()
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    status = finish(job).status
    assert status == 1, status
    took = time.monotonic() - started
    succeeds(f"{LONG} --resume", folder, processes=2)
    return f"exit 1 after {took:.0f} s; resumed: exit 0"


@fault("a rank is stopped for 5 s, of two")
def _() -> str:
    folder = new_folder()
    job = begin(LONG, folder, processes=2)
    wait_for(lambda: has_state(folder))
    rank = children(job.pid)[-1]
    os.kill(rank, signal.SIGSTOP)
    time.sleep(5)
    os.kill(rank, signal.SIGCONT)
    result = finish(job)
    assert result.status == 0, result.err[-300:]
    return "the others wait; exit 0"


@fault("a second owner of a run")
def _() -> str:
    folder = new_folder()
    job = begin(LONG, folder)
    wait_for(lambda: has_state(folder))
    refused = run(LONG, folder)
    assert refused.status == 2, refused.err
    text = one_line(refused, folder / "nothing", "in use by process")
    assert finish(job).status == 0
    return f"second: {text.replace(str(folder), 'OUT')}; first: exit 0, {same_as(LONG, folder)}"


@fault("a quota of half a CPU")
def _() -> str:
    group = Path("/sys/fs/cgroup/faults")
    folder = new_folder()
    try:
        group.mkdir()
        (group / "cpu.max").write_text("50000 100000")
    except OSError as error:
        raise NotHereError("making a cgroup with a quota needs cgroup v2 and root") from error
    try:
        succeeds(TRAIN, folder, preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    finally:
        group.rmdir()
    return f"exit 0; {same_as(TRAIN, folder)}"


def main() -> int:
    words = sys.argv[1:]
    print("| fault | outcome | as promised |\n|---|---|---|", flush=True)
    num_broken = 0
    for name, inject in FAULTS:
        if words and not any(word in name for word in words):
            continue
        try:
            outcome, verdict = inject(), "yes"
        except NotHereError as reason:
            outcome, verdict = f"not injected: {reason}", "-"
        except (AssertionError, subprocess.TimeoutExpired) as error:
            outcome, verdict = " ".join(str(error).split())[:300], "NO"
            num_broken += 1
        print(f"| {name} | {outcome} | {verdict} |", flush=True)
    return 1 if num_broken else 0


if __name__ == "__main__":
    REFERENCES: dict[str, Path] = {}
    PLACE = tempfile.TemporaryDirectory()
    with PLACE:
        sys.exit(main())
