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

from test_resume import assert_same_outcome  # noqa: E402

DATA = "--dataset digits --num-workers 0 --num-threads 1"
MODEL = f"train.py --model cnn_small --batch-size 32 {DATA}"
TRAIN = f"{MODEL} --limit-train 96 --limit-eval 40 --epochs 6 --ema 0.9"
LONG = f"{MODEL} --epochs 4 --checkpoint-every 5"
EXPORT = "export_data.py --dataset digits --num-workers 0"
PROFILE = "profile.py --models cnn_small --num-steps 3 --num-threads 1"
REFERENCES: dict[str, Path] = {}  # a command -> the folder of its run without a fault
PLACE = tempfile.TemporaryDirectory()


def begin(
    command: str, folder: Path, *, processes: int = 1, before: Callable[[], object] | None = None
) -> subprocess.Popen:
    """Start a command that writes to `folder`. `before` is called in the new process, before the command."""
    launch = [sys.executable]
    if processes > 1:
        launch += f"-m torch.distributed.run --standalone --nproc-per-node={processes}".split()
    argv = [*launch, *command.split(), "--output-dir", str(folder)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        argv,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )


def finish(job: subprocess.Popen) -> SimpleNamespace:
    out, err = job.communicate(timeout=300)
    return SimpleNamespace(status=job.returncode, out=out, err=err)


def run(
    command: str, folder: Path, *, processes: int = 1, before: Callable[[], object] | None = None
) -> SimpleNamespace:
    return finish(begin(command, folder, processes=processes, before=before))


def succeeds(
    command: str, folder: Path, *, processes: int = 1, before: Callable[[], object] | None = None
) -> SimpleNamespace:
    result = run(command, folder, processes=processes, before=before)
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


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def has_state(folder: Path) -> bool:
    return any((folder / "checkpoints" / "cnn_small_state").glob("step_*.safetensors"))


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
    argv = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(argv, check=True, capture_output=True)


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=PLACE.name)) / "out"


def same_as(command: str, folder: Path) -> str:
    """Resume or repeat the run, and compare it with one that met no fault."""
    if command not in REFERENCES:
        REFERENCES[command] = new_folder()
        succeeds(command, REFERENCES[command])
    succeeds(f"{command} --resume", folder)
    assert_same_outcome(folder, REFERENCES[command])
    return "resumed: equal"


def full_disk(command: str, size: str, link: str = "") -> str:
    """A disk is full: the whole output folder's, or that of a folder `link` in it. Then it gets room."""
    with disk(f"size={size}") as small:
        folder = small / "out"
        if link:
            folder = new_folder()
            folder.mkdir()
            (folder / link).symlink_to(small)
        result = run(command, folder)
        text = one_line(result, folder, str(folder if link else small)) if result.status else "exit 0"
        empty = [path.name for path in small.rglob("*.json") if not path.stat().st_size]
        assert not empty, f"empty: {empty}"
        mount("remount,size=100m", small)
        if command == TRAIN:
            return f"{text}; {same_as(command, folder)}"
        succeeds(command, folder)
        return f"{text}; again: exit 0"


def small_files() -> str:
    folder, limits = new_folder(), (10**6, resource.RLIM_INFINITY)
    result = run(TRAIN, folder, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    return f"{one_line(result, folder, 'File too large', str(folder))}; {same_as(TRAIN, folder)}"


def read_only(command: str) -> str:
    with disk("ro") as folder:
        text = one_line(run(command, folder / "out"), folder, str(folder))
        assert text.startswith("exit 2"), text
        return text


def other_disk(link: str) -> str:
    folder = new_folder()
    with disk("size=100m") as other:
        folder.mkdir()
        (folder / link).symlink_to(other)
        succeeds(TRAIN, folder)
        assert "The files of an older run" in succeeds(TRAIN, folder).out
        return f"exit 0 both times; {same_as(TRAIN, folder)}"


def killed(command: str, seconds: float) -> str:
    """SIGKILL so many seconds after the first state, or the first image."""
    folder = new_folder()
    job = begin(command, folder)
    wait_for(lambda: has_state(folder) or [*folder.glob("train/*/*.png")])
    time.sleep(seconds)
    job.kill()
    finish(job)
    if command == LONG:
        return same_as(command, folder)
    succeeds(EXPORT, folder)
    succeeds(f"{EXPORT} --verify", folder)
    return "again: whole"


def rank_of_two(stop: bool) -> str:
    """One rank is stopped for 5 seconds, or killed."""
    folder = new_folder()
    job = begin(LONG, folder, processes=2)
    wait_for(lambda: has_state(folder))
    rank = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[-1])
    os.kill(rank, signal.SIGSTOP if stop else signal.SIGKILL)
    if stop:
        time.sleep(5)
        os.kill(rank, signal.SIGCONT)
    status = finish(job).status
    assert status == (0 if stop else 1), status
    succeeds(f"{LONG} --resume", folder, processes=2)
    return f"exit {status}; resumed: exit 0"


def two_owners() -> str:
    folder = new_folder()
    job = begin(LONG, folder)
    wait_for(lambda: has_state(folder))
    text = one_line(run(LONG, folder), folder / "nothing", "in use by process")
    assert finish(job).status == 0
    return f"second: {text}; first: exit 0, {same_as(LONG, folder)}"


def cpu_quota() -> str:
    root, folder = Path("/sys/fs/cgroup"), new_folder()
    is_version_2 = (root / "cgroup.controllers").exists()
    group = root / ("faults" if is_version_2 else "cpu/faults")
    group.mkdir()
    try:
        if is_version_2:
            (group / "cpu.max").write_text("50000 100000")
        else:  # the period is 100,000 microseconds
            (group / "cpu.cfs_quota_us").write_text("50000")
        succeeds(TRAIN, folder, before=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    finally:
        group.rmdir()
    return f"exit 0; {same_as(TRAIN, folder)}"


FAULTS = (
    *((f"full disk of {size}, train", full_disk, TRAIN, size) for size in ("64k", "1m", "4m", "9m", "12m")),
    ("full disk of 16k under runs/, train", full_disk, TRAIN, "16k", "runs"),
    ("full disk of 3m under checkpoints/, train", full_disk, TRAIN, "3m", "checkpoints"),
    ("full disk of 200k, export", full_disk, EXPORT, "200k"),
    ("full disk of 16k, profile", full_disk, PROFILE, "16k"),
    ("full disk of 200k, profile", full_disk, PROFILE, "200k"),
    ("files of at most 1 MB (RLIMIT_FSIZE), train", small_files),
    ("read-only disk, train", read_only, TRAIN),
    ("read-only disk, export", read_only, EXPORT),
    ("read-only disk, profile", read_only, PROFILE),
    ("another disk under checkpoints/, train twice", other_disk, "checkpoints"),
    ("another disk under runs/, train twice", other_disk, "runs"),
    *((f"killed {seconds} s after a state, train", killed, LONG, seconds) for seconds in (0.0, 0.2, 0.5)),
    *((f"killed {seconds} s after an image, export", killed, EXPORT, seconds) for seconds in (0.0, 0.2)),
    ("one rank of two is killed", rank_of_two, False),
    ("one rank of two is stopped for 5 s", rank_of_two, True),
    ("a second owner of a run", two_owners),
    ("a quota of half a CPU, train", cpu_quota),
)


def main() -> int:
    print("| fault | outcome | as promised |\n|---|---|---|", flush=True)
    num_broken = 0
    for name, inject, *arguments in FAULTS:
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        try:
            outcome, verdict = inject(*arguments), "yes"
        except (OSError, subprocess.CalledProcessError) as error:
            outcome, verdict = f"not injected: {error}", "-"
        except (AssertionError, subprocess.TimeoutExpired) as error:
            outcome, verdict = " ".join(str(error).split())[:300], "NO"
            num_broken += 1
        print(f"| {name} | {outcome} | {verdict} |", flush=True)
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main())
