"""Build, train, save and load the smallest model of each of timm's modules, as the scripts do it.

    python benchmarks/timm_sweep.py                      # all modules, a table on standard output
    python benchmarks/timm_sweep.py --modules coat byobnet

Each module has a process of its own, so that a crash is a line of the table. Columns: seconds; `logits` is
the largest difference between the logits with our memory layout and with contiguous weights, relative to the
largest logit; `other size` says whether the weights load at another image size. Exit status 1: a model does
not work at its own size.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safetensors.torch
import timm
import torch
from timm.models._registry import _model_to_module
from torch.nn import functional as F

from modeling import models
from modeling.data.resize import Preprocessing
from modeling.errors import UserError
from modeling.files import unique_tensors
from modeling.models.weights import Weights
from modeling.run import checkpoint
from modeling.run.header import CHOICES

NUM_CLASSES = 10
NUM_CANDIDATES = 3  # models of a module that are looked at for the smallest
LIMIT_SECONDS = 600
MAX_SIDE = 448  # a multiple of the patches of 14, 16 and 32 pixels
TOLERANCE = 1e-3
# Models that are tried too: the first layers of RepVGG and MobileOne crash torch in channels-last layout.
ALSO = {"byobnet": ("repvgg_a0", "mobileone_s0")}
# Parts of the names of small models.
SMALL = "test_ atto femto pico nano tiny xxs xs _s lite 050 b0 mini micro 18 14 _t n0 a0 m0 _0 n_".split()


def image_side(name: str) -> int:
    """The model's own image size, but at most MAX_SIDE if it also takes other sizes."""
    side = models.find_weights(f"timm/{name}").preprocessing.image_size
    return side if timm.get_pretrained_cfg(name).fixed_input_size else min(side, MAX_SIDE)


def smallest_model(names: list[str]) -> tuple[str, int]:
    """Return the model that needs least arithmetic, and its number of parameters."""
    likely = sorted(names, key=lambda name: (-sum(part in name for part in SMALL), len(name), name))
    work = {}
    for name in likely[:NUM_CANDIDATES]:
        if name.endswith("_enc"):  # an encoder without a classifier
            continue
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=NUM_CLASSES)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        work[name] = (num_parameters * image_side(name) ** 2, num_parameters)
    name = min(work, key=work.get)
    return name, work[name][1]


def try_model(name: str, folder: Path) -> tuple[float, str]:
    """Build, train, save, load; load timm's 1,000 classes. Return the difference and `other size`."""
    side = image_side(name)
    arguments = {"name": f"timm/{name}", "num_classes": NUM_CLASSES, "image_size": side}
    torch.manual_seed(0)
    model = models.build_model(**arguments).train()
    images, labels = torch.randn(2, 3, side, side), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    assert loss.isfinite()

    path = folder / "ours.safetensors"
    header = checkpoint.make_header(
        model=arguments,
        classes=[str(number) for number in range(NUM_CLASSES)],
        preprocessing=Preprocessing(image_size=side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        arguments={"model": arguments["name"], "run_name": name, "seed": 0, "val_fraction": 0.1},
        dataset={
            "name": "digits",
            "revision": None,
            "train_sha256": "0",
            "read": {"splits": {}, "left_out": {}, "choices": dict.fromkeys(CHOICES)},
        },
        weights=Weights(),
    )
    header |= {"epoch": 1, "step": 2, "metrics": {}}
    checkpoint.save_checkpoint(path, model.state_dict(), header, {"train_seconds": 0.0})
    loaded, _ = checkpoint.load_model(path)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images)), "the loaded model differs"

    with torch.no_grad():
        got = model(images)
        expected = model.to(memory_format=torch.contiguous_format)(images)
    difference = float((expected - got).abs().max() / expected.abs().max())
    assert difference < TOLERANCE, f"the logits differ by {difference:.1e} from those of contiguous weights"

    path = folder / "timm.safetensors"
    sized = {"img_size": side} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    pretrained = timm.create_model(name, **sized).state_dict()
    safetensors.torch.save_file(unique_tensors(pretrained), path)
    try:
        models.build_model(**arguments, weights=path)
    except UserError as error:
        # Its weights need a preprocessing that we do not have, and are refused. The model itself works.
        if "the record of" not in str(error):
            raise
        return difference, f"weights refused: {str(error).partition(' cannot be used: ')[2]}"
    try:
        models.build_model(**arguments | {"image_size": side // 32 * 32 + 64}, weights=path)
        other = "loads"
    except UserError as error:
        other = f"refused: {error}".replace(str(path), "FILE")[:90]
    return difference, other


def run_child(names: list[str], connection) -> None:
    """In a process of its own: send the name of the smallest model, then what came out."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        name, num_parameters = smallest_model(names)
        connection.send((name, num_parameters))
        with tempfile.TemporaryDirectory() as folder:
            connection.send(try_model(name, Path(folder)))
    except Exception as error:  # it is a line of the table
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")


def sweep_module(module: str, names: list[str]) -> bool:
    """Print the module's line. Return whether its model works."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=run_child, args=(names, sender))
    start = time.monotonic()
    process.start()
    sender.close()
    received = []
    try:
        while len(received) < 2 and receiver.poll(LIMIT_SECONDS):
            received.append(receiver.recv())
    except EOFError:
        pass
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    name, num_parameters = received[0] if received and isinstance(received[0], tuple) else ("?", 0)
    outcome = received[-1] if received else "nothing"
    works = len(received) == 2 and isinstance(outcome, tuple)
    if works:
        text = f"{outcome[0]:8.1e}  {outcome[1]}"
    else:
        text = outcome if isinstance(outcome, str) else f"ended with exit code {process.exitcode}"
    seconds = time.monotonic() - start
    print(
        f"{'ok  ' if works else 'FAIL'}  {module:26} {name:38} {num_parameters:>12,} {seconds:6.1f}  {text}",
        flush=True,
    )
    return works


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--modules", nargs="+", help="names of timm's modules (default: all)")
    args = parser.parse_args(argv)
    by_module: dict[str, list[str]] = {}
    for name in timm.list_models():
        by_module.setdefault(_model_to_module[name], []).append(name)
    chosen = args.modules or sorted(by_module)
    unknown = [module for module in chosen if module not in by_module]
    if unknown:
        parser.error(f"timm has no module {', '.join(unknown)}")
    print(f"      {'module':26} {'smallest model':38} {'parameters':>12} {'s':>6}  {'logits':8}  other size")
    works = []
    for module in chosen:
        works.append(sweep_module(module, by_module[module]))
        works += [sweep_module(module, [name]) for name in ALSO.get(module, ())]
    print(f"{sum(works)} of {len(works)} models of {len(chosen)} modules work")
    return 0 if all(works) else 1


if __name__ == "__main__":
    sys.exit(main())
