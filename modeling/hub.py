"""The Hugging Face hub, asked once whether it is there, so that a machine without network waits seconds and not minutes."""

import functools
import urllib.error
import urllib.request

import datasets
import httpx2
import huggingface_hub

TIMEOUT_SECONDS = 5
HUB_ERRORS = (OSError, httpx2.HTTPError)  # what a download raises; an HfHubHTTPError is one of the latter


@functools.cache
def prepare_hub() -> bool:
    """Whether the hub answers. Where it does not, the libraries are told to use what they have cached, and not to retry."""
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return False
    return True
