"""Progress with a rate and an ETA."""

import sys
import time

from tqdm import tqdm

from modeling.run.launch import is_main_process

_LOG_SECONDS = 30


class Progress:
    """Progress with a rate and an ETA: a bar on a terminal, elsewhere a line on standard error every 30 seconds.

    Of the main process; with `everywhere`, of each that makes one.
    """

    def __init__(
        self, total: int, description: str, unit: str = " images", done: int = 0, everywhere: bool = False
    ):
        self.shown = everywhere or is_main_process()
        self.total, self.count, self.description, self.unit, self.done = total, done, description, unit, done
        self.started = self.logged = time.monotonic()
        self.bar = (
            tqdm(total=total, initial=done, desc=description, unit=unit, dynamic_ncols=True)
            if sys.stderr.isatty() and self.shown
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, n: int) -> None:
        self.count += n
        if self.bar is not None:
            self.bar.update(n)
        elif self.shown and time.monotonic() - self.logged >= _LOG_SECONDS:
            self.logged = time.monotonic()
            seconds, options = (
                self.logged - self.started,
                dict(prefix=self.description, unit=self.unit, ncols=0, initial=self.done),
            )
            meter = tqdm.format_meter(self.count, self.total, seconds, **options)
            print(meter, file=sys.stderr, flush=True)

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
