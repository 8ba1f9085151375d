"""Environment variables that libraries read when they are imported: this module comes before them."""

import os
import sys

SECONDS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")


def drop_bad_timeouts() -> None:
    """Unset a variable that is not a whole number of seconds, and say so: huggingface_hub would not start."""
    for name in SECONDS:
        value = os.environ.get(name, "1")
        if not (value.isdecimal() and int(value) > 0):
            del os.environ[name]
            if sys.stderr:
                print(
                    f"{name}={value} is ignored: it must be a whole number of seconds, such as 10",
                    file=sys.stderr,
                )
