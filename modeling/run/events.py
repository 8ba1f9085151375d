"""TensorBoard writes its events in a thread of its own, which shows a traceback if the disk is full."""

import contextlib
import threading
from collections.abc import Iterator

_WRITER_MODULE = "tensorboard.summary.writer.event_file_writer"


@contextlib.contextmanager
def hidden_writer_thread() -> Iterator[None]:
    """In this block the traceback of that thread is not shown: its error also reaches the caller."""
    previous_hook = threading.excepthook

    def show_others(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__ != _WRITER_MODULE:
            previous_hook(args)

    threading.excepthook = show_others
    try:
        yield
    finally:
        threading.excepthook = previous_hook
