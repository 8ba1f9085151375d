"""Show progress, with the rate and the time left."""

import sys
import time

from tqdm import tqdm

from modeling.run.launch import is_main_process

LOG_SECONDS = 30  # between two lines, if there is no terminal


class Progress:
    """A progress bar on a terminal, otherwise a line on standard error every LOG_SECONDS.

    `total` is the number of units (such as images) of the whole job. `done` units were done before the job
    was resumed. Only the main process shows progress, unless `everywhere` is set.
    """

    def __init__(
        self, total: int, description: str, unit: str = " images", done: int = 0, everywhere: bool = False
    ):
        self.total = total
        self.description = description
        self.unit = unit
        self.count = self.done = done
        self.started = self.logged = time.monotonic()
        self.is_shown = everywhere or is_main_process()
        self.bar = None
        if self.is_shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=description, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, n: int) -> None:
        """Count `n` more units."""
        self.count += n
        if self.bar is not None:
            self.bar.update(n)
        elif self.is_shown and time.monotonic() - self.logged >= LOG_SECONDS:
            self.logged = time.monotonic()
            line = tqdm.format_meter(
                self.count,
                self.total,
                self.logged - self.started,
                prefix=self.description,
                unit=self.unit,
                ncols=0,
                initial=self.done,
            )
            print(line, file=sys.stderr, flush=True)

    def describe(self, text: str) -> None:
        self.description = text
        if self.bar is not None:
            self.bar.set_description(text)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)
        if self.bar is not None:
            self.bar.refresh()
