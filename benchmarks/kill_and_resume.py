"""Kill runs at random moments, resume them, and count those that end bitwise as an unkilled run.

    python benchmarks/kill_and_resume.py --kills 50 --dataset FOLDER_OR_NAME

There are four configurations: 1 and 2 processes, each in fp32 and bf16. All have dropout, EMA, mixup and
accumulation, and save a state every 5 steps. A kill is SIGKILL to every process of the job, at a moment drawn
uniformly from its training time. A kill that comes after the job's end is not counted; it is drawn again.

Prints a line for each kill, then the number of runs that ended equal. Two runs are equal if metrics.jsonl is,
and so are the weights and headers of both checkpoints. The clock in the headers does not count.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_resume import assert_no_step_twice, assert_same_outcome  # noqa: E402

from modeling.run.checkpoint import read_header  # noqa: E402

RUN = "--model cnn_small --limit-train 2000 --limit-eval 1000 --batch-size 50 --epochs 3 --checkpoint-every 5"
RUN += " --head-dropout 0.5 --ema 0.9 --augment standard --mixup 0.4 --gradient-accumulation-steps 2"
CONFIGURATIONS = [(processes, precision) for processes in (1, 2) for precision in ("no", "bf16")]


def start(processes: int, precision: str, dataset: str, folder: Path, *flags: str) -> subprocess.Popen:
    """The job, up to where it has said what it trains on."""
    launch = [sys.executable]
    if processes > 1:
        config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
        launch = [
            str(Path(sys.executable).parent / "accelerate"),
            "launch",
            "--config_file",
            str(config),
            "--main_process_port",
            "0",
        ]
    argv = [
        *launch,
        str(ROOT / "train.py"),
        *RUN.split(),
        "--dataset",
        dataset,
        "--mixed-precision",
        precision,
        "--output-dir",
        str(folder),
    ]
    job = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not job.stdout.readline().startswith("hardware"):
        assert job.poll() is None, argv
    return job


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def end(job: subprocess.Popen) -> str:
    out, _ = job.communicate()
    assert job.returncode == 0, out
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, hits, equal = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as place:
        references: dict[tuple[int, str], tuple[Path, float]] = {}
        while hits < args.kills:
            configuration = CONFIGURATIONS[hits % len(CONFIGURATIONS)]
            if configuration not in references:
                folder = Path(place) / f"reference_{len(references)}"
                end(start(*configuration, args.dataset, folder))
                header = read_header(folder / "checkpoints" / "cnn_small_final.safetensors")
                references[configuration] = folder, header["clock"]["train_seconds"]
            reference, seconds = references[configuration]
            folder = Path(place) / "run"
            job = start(*configuration, args.dataset, folder)
            moment = rng.random() * seconds
            time.sleep(moment)
            running = job.poll() is None
            if running:
                # The launcher puts its processes in sessions of their own, so each is killed by its id.
                for pid in (*children(job.pid), job.pid):
                    os.kill(pid, signal.SIGKILL)
            job.communicate()
            states = sorted((folder / "checkpoints").glob("*_state/step_*")) if running else []
            if running:
                hits += 1
                end(start(*configuration, args.dataset, folder, "--resume"))
                try:
                    assert_same_outcome(folder, reference)
                    assert_no_step_twice(folder)
                    equal += 1
                    verdict = "equal"
                except AssertionError as error:
                    verdict = f"DIFFERENT {error}"
                newest = int(states[-1].name[5:13]) if states else 0
                print(
                    f"kill {hits:2}: {configuration}, {moment:.2f} s into training, "
                    f"resumed after step {newest}: {verdict}",
                    flush=True,
                )
            shutil.rmtree(folder)
    print(f"{equal} of {hits} runs ended bitwise equal")
    return 0 if equal == hits else 1


if __name__ == "__main__":
    sys.exit(main())
