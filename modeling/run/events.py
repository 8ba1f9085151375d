"""TensorBoard's events, which are not worth a run: metrics.jsonl has the same values."""

import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

_WRITER_MODULE = "tensorboard.summary.writer.event_file_writer"


class Events:
    """Has the methods of SummaryWriter. The first OSError is one warning line; then nothing is written.

    TensorBoard writes in a thread of its own. That thread's traceback is not shown.
    """

    def __init__(self, folder: Path, *, first_step: int):
        self.folder = folder
        self.writer: SummaryWriter | None = None
        self.previous_hook = threading.excepthook
        threading.excepthook = self._hide_writer_thread
        try:
            self.writer = SummaryWriter(folder, purge_step=first_step)
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            if self.writer is not None:
                try:
                    getattr(self.writer, name)(*args, **kwargs)
                except OSError as error:
                    self._give_up(error)

        return call

    def close(self) -> None:
        self.__getattr__("close")()
        threading.excepthook = self.previous_hook

    def _give_up(self, error: OSError) -> None:
        print(
            f"TensorBoard's events in {self.folder} end here: {error.strerror or error}; "
            "metrics.jsonl has the same values",
            file=sys.stderr,
            flush=True,
        )
        writer, self.writer = self.writer, None
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.close()

    def _hide_writer_thread(self, args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__ != _WRITER_MODULE:
            self.previous_hook(args)
