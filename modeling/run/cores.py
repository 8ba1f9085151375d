"""The processor cores that this process may use, and how busy other programs keep them."""

import os
from pathlib import Path

import psutil

MIN_SECONDS = 0.5  # a shorter look at the load says nothing
BUSY_SHARE = 0.25  # of the cores, in use by others


def num_cores() -> int:
    """The processor cores that this process may use: its affinity, and the CPU quota of its container."""
    cores, quota = len(_allowed_cores()), cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _allowed_cores() -> set[int]:
    """The numbers of the cores that the process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The cores' worth of time that control groups (v1 and v2) allow; None: no limit.

    The smallest quota of the process's group and of the groups above it counts. `root` is / but in tests.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for line in lines:  # such as 0::/user.slice, or 4:cpu,cpuacct:/docker/3f2a
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":  # version 2
            mounts, read = ["unified", ""], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = [controllers, "cpu"], _quota_v1
        else:
            continue
        # In a container this path may be the host's. The container then sees only the root of the groups.
        path = Path(group.lstrip("/"))
        for mount in mounts:
            for folder in (path, *path.parents):
                quota = read(root / "sys/fs/cgroup" / mount / folder)
                if quota:
                    quotas.append(quota)
    return min(quotas, default=None)


def _quota_v1(folder: Path) -> float | None:
    """cpu.cfs_quota_us is -1 without a limit."""
    quota = _numbers(folder / "cpu.cfs_quota_us")
    period = _numbers(folder / "cpu.cfs_period_us")
    return quota[0] / period[0] if quota and period and quota[0] > 0 else None


def _quota_v2(folder: Path) -> float | None:
    """cpu.max holds quota and period, or the word max without a limit."""
    numbers = _numbers(folder / "cpu.max")
    return numbers[0] / numbers[1] if len(numbers) == 2 else None


def _numbers(path: Path) -> list[float]:
    """The numbers of a file; none where it is missing, or holds something else."""
    try:
        return [float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


class Load:
    """How many cores other programs used, since the last look."""

    def __init__(self):
        self.seconds, self.others = _usage()

    def look(self) -> float | None:
        """The cores in use by others; None: too short a time to say."""
        seconds, others = _usage()
        passed, used = seconds - self.seconds, others - self.others
        if passed < MIN_SECONDS:
            return None
        self.seconds, self.others = seconds, others
        return max(0.0, used / passed)


def _usage() -> tuple[float, float]:
    """The time in seconds, and the core seconds that other processes have used of the allowed cores."""
    mine, allowed = os.times(), _allowed_cores()
    busy = 0.0
    for number, times in enumerate(psutil.cpu_times(percpu=True)):
        if number in allowed:
            idle = times.idle + getattr(times, "iowait", 0.0)
            counted_twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
            busy += sum(times) - idle - counted_twice
    return mine.elapsed, busy - mine.user - mine.system


_load = Load()  # from the time when the program starts


def busy_advice(*, num_threads: int, processes_here: int) -> str | None:
    """A line about a machine that other programs keep busy; None: it has room for this job's threads.

    processes_here: this job's processes on this machine.
    """
    others, cores = _load.look(), len(_allowed_cores())
    if others is None:
        return None
    others -= processes_here - 1  # the job's other processes start, too, on a core each
    advised = max(1, int(cores - others) // processes_here)
    if others < BUSY_SHARE * cores or advised >= num_threads:
        return None
    return (
        f"Other programs use {others:.1f} of the {cores} cores. Fewer threads may be faster than "
        f"{num_threads}: set --num-threads {advised} or OMP_NUM_THREADS={advised}"
    )
