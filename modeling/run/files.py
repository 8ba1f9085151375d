"""The files and folders of a run, in one place.

checkpoints/{run}_best.safetensors and {run}_final.safetensors    the checkpoints
checkpoints/{run}_state/                                          the states to resume from (state.py)
runs/{run}/                                                       logs and pictures (tracking.py, curves.py)
checkpoints/.{run}.lock, runs/.{run}.lock                         the locks (lock.py)
traces/                                                           what evaluate.py writes for a checkpoint
previous/{run}-{time}/                                            an older run of the same name, moved aside
"""

import contextlib
import datetime
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from modeling.errors import UserError
from modeling.files import check_writable


@dataclass(frozen=True)
class RunFiles:
    """The files of the run `run` under `output_dir`. This class creates no file. The paths need not exist."""

    output_dir: Path
    run: str

    def __post_init__(self):
        if not self.run or self.run.startswith(".") or Path(self.run).name != self.run:
            raise UserError(
                f"--run-name {self.run!r} must be a plain file name, without folders or a leading dot"
            )

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch on validation."""
        return self.output_dir / "checkpoints" / f"{self.run}_best.safetensors"

    @property
    def final(self) -> Path:
        """The checkpoint of the last epoch."""
        return self.output_dir / "checkpoints" / f"{self.run}_final.safetensors"

    @property
    def states(self) -> Path:
        """The folder of the states to resume from."""
        return self.output_dir / "checkpoints" / f"{self.run}_state"

    @property
    def logs(self) -> Path:
        """The folder of TensorBoard's events and metrics.jsonl."""
        return self.output_dir / "runs" / self.run

    @property
    def bad_images(self) -> Path:
        """The list of images that --skip-bad-images left out."""
        return self.logs / "bad_images.txt"

    @property
    def locks(self) -> list[Path]:
        """The lock files of the run. Each of its folders has one, because a folder may be a link."""
        folders = {(self.output_dir / name).resolve() for name in ("checkpoints", "runs")}
        return [folder / f".{self.run}.lock" for folder in sorted(folders)]

    def evaluations(self) -> list["EvaluationFiles"]:
        """What evaluate.py may have written of this run on its own dataset: see EvaluationFiles."""
        traces = self.output_dir / "traces"
        names = []
        for name in (self.run, self.best.stem, self.final.stem):
            names += [name, *(f"{name}_{split}" for split in ("train", "validation", "test"))]
        return [EvaluationFiles(traces, name) for name in names]

    def all(self) -> list[Path]:
        """Every path that belongs to this run, whether it exists or not; the states last."""
        paths = [self.logs, self.final, self.best]
        for evaluation in self.evaluations():
            paths += evaluation.all()
        return [*paths, self.states]

    def check_writable(self) -> None:
        """Try to write to the run's folders as training will. UserError: that fails."""
        longest_name = max(len(os.fsencode(path.name)) for path in self.all())
        for folder in (self.output_dir, self.best.parent, self.logs.parent):
            check_writable(folder, longest_name)

    def move_aside(self) -> list[Path]:
        """Move an older run's files to previous/{run}-{time}/, all or none. Return the folders they are in.

        A file on another file system goes to .previous/{run}-{time}/ beside it: to copy it could take long,
        or fill a disk. The states are moved last, so that a move that was killed can still be resumed.
        """
        time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        name = f"{self.run}-{time}"
        moved: list[tuple[Path, Path]] = []
        folders: list[Path] = []
        try:
            for path in self.all():
                if path.exists():
                    folder, target = self._move(path, name)
                    folders.append(folder)
                    moved.append((path, target))
        except OSError:
            for path, target in moved:
                target.rename(path)
            raise
        return list(dict.fromkeys(folders))

    def _move(self, path: Path, name: str) -> tuple[Path, Path]:
        """Move one file or folder. Return the folder of the older run, and the path in it."""
        folder = self.output_dir / "previous" / name
        target = folder / path.relative_to(self.output_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.rename(target)
        except OSError as error:
            with contextlib.suppress(OSError):  # other files of the run are in it
                os.removedirs(target.parent)
            if error.errno != errno.EXDEV:
                raise
            folder = path.parent / ".previous" / name
            target = folder / path.name
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        return folder, target


@dataclass(frozen=True)
class EvaluationFiles:
    """The files that evaluate.py writes for a checkpoint.

    `name` is the run's, or the checkpoint's stem where two share a run. An evaluation on another split than
    the default one, or on another dataset, has these in its name too.
    """

    folder: Path
    name: str

    @property
    def confusion_matrix(self) -> Path:
        return self.folder / f"confusion_matrix_{self.name}.png"

    @property
    def report(self) -> Path:
        return self.folder / f"classification_report_{self.name}.txt"

    @property
    def predictions(self) -> Path:
        return self.folder / f"predictions_{self.name}.csv"

    def all(self) -> list[Path]:
        return [self.confusion_matrix, self.report, self.predictions]
