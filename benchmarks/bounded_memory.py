"""Train on a store of decoded images that is larger than the memory limit of the process.

Needs Linux and root, because it makes a cgroup.

    python benchmarks/bounded_memory.py [--gigabytes 3] [--limit 1.2]

The limit includes the page cache, so the kernel must drop pages of the store during training.
Swapping is not allowed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SIDE = 256


def make_cgroup(limit: int) -> tuple[Path, Path]:
    """Make a cgroup (version 1 or 2) with a limit in bytes. Return its folder and the file of its peak."""
    first = Path("/sys/fs/cgroup/memory")
    folder = (first if first.is_dir() else first.parent) / f"bounded_{os.getpid()}"
    folder.mkdir()
    if first.is_dir():
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        return folder, folder / "memory.max_usage_in_bytes"
    (folder / "memory.max").write_text(str(limit))
    (folder / "memory.swap.max").write_text("0")
    return folder, folder / "memory.peak"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of the store")
    parser.add_argument("--limit", type=float, default=1.2, help="gigabytes that the process may use")
    args = parser.parse_args()
    count = int(args.gigabytes * 1e9 / (3 * SIDE**2))
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(count):
            path = Path(folder, "images", "train", "ab"[i % 2], f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIDE, SIDE)).save(
                path, quality=50
            )
        cgroup, peak = make_cgroup(int(args.limit * 1e9))
        flags = (
            f"--model cnn_small --dataset {folder}/images --image-size 32 --epochs 2 "
            f"--val-fraction 0.02 --output-dir {folder}"
        )
        join = ["sh", "-c", f'echo $$ > {cgroup}/cgroup.procs; exec "$@"', "sh"]
        env = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache"}
        try:
            started = time.time()
            done = subprocess.run(
                [*join, sys.executable, ROOT / "train.py", *flags.split()],
                env=env,
                capture_output=True,
                text=True,
            )
            store = sum(path.stat().st_size for path in Path(folder, "cache").rglob("pixels"))
            print(
                f"{count:,} images, a store of {store / 1e9:.2f} GB, a limit of {args.limit} GB: "
                f"exit status {done.returncode}"
            )
            print(f"{time.time() - started:.0f} s, peak with page cache {int(peak.read_text()) / 1e9:.2f} GB")
            print(
                "\n".join(re.findall(r"^(?:epoch|Trained).*", done.stdout, re.MULTILINE))
                or done.stderr[-2000:]
            )
        finally:
            cgroup.rmdir()


if __name__ == "__main__":
    main()
