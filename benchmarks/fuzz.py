"""Damage checkpoints, states, config.json and weights at random, and count what comes of it.

    python benchmarks/fuzz.py                               # 10,000 mutations
    python benchmarks/fuzz.py --mutations 500 --seed 7      # the same seed gives the same mutations

Every file must load as it was, or be refused by a UserError (exit status 2). A record that was edited and
given a new digest may also be valid, and load as another one. Outcomes that are wrong: `traceback`, `altered`
(damage that loads unseen), `slow` (above 10 s of CPU time, or 100 s), `memory` (above 1 GB) and `outside`
(a file was written outside --output-dir). Exit status 1: there was one.
"""

import argparse
import contextlib
import hashlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safetensors.torch
import timm
import torch
from accelerate import Accelerator

import train
from modeling import cost, evaluation, models
from modeling.errors import UserError
from modeling.files import HEADER_KEY, read_tensors, tensors_digest, unique_tensors
from modeling.optim import build_optimizer
from modeling.run import checkpoint, state
from modeling.run.header import header_digest

LIMIT_SECONDS = 10
LIMIT_KILOBYTES = 2**20
BAD = ("traceback", "altered", "slow", "memory", "outside")
EVALUATED = 25  # evaluate.py runs on one of so many edited checkpoints that load
MODEL = "timm/test_resnet"
DEEP = json.loads(300 * "[" + 300 * "]")
ODD = (None, True, 0, -1, 1, 2, 3, 0.5, -0.5, 1e9, 1e300, 10**6, 2**31, 10**12, 10**400, float("nan"))
ODD += (
    "",
    "x",
    "../../x",
    "/tmp/x",
    ".x",
    "a/b",
    5000 * "a",
    "\ud800",
    "\0",
    "\x1b[31m",
    "cnn",
    "timm/vit_tiny_patch16_224",
)
ODD += ([], [1], [0.5, 0.5], ["a", "a"], {}, {"a": 1}, DEEP)


# ---- Mutations -----------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flip a bit, cut the end, add bytes, overwrite or repeat a piece. Half of them near the start."""
    end = min(len(content), 6000) if rng.random() < 0.5 else len(content)
    start = rng.randrange(end)
    length = rng.choice((1, 8, 100))
    kind = rng.randrange(6)
    if kind < 2:
        changed = bytes([content[start] ^ 1 << rng.randrange(8)])
        return content[:start] + changed + content[start + 1 :]
    if kind == 2:
        return content[:start]
    if kind == 3:
        return content + rng.randbytes(length)
    if kind == 4:
        return content[:start] + bytes(length) + content[start + length :]
    return content[:start] + content[start : start + length] + content[start:]


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Change one place of a JSON value: another value, a key less, a key more, or a list in another order."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key, child in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
            places.append((node, key))
            if isinstance(child, dict | list):
                collect(child)

    value = json.loads(json.dumps(value))
    collect(value)
    if not places or rng.random() < 0.02:
        return rng.choice(ODD)
    node, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind < 6:
        node[key] = rng.choice(ODD)
    elif kind == 6:
        del node[key]
    elif kind == 7 and isinstance(node, dict):
        node[rng.choice(("weights", "x", "name", "depth", "timm_args"))] = rng.choice(ODD)
    elif kind == 8 and isinstance(node[key], int | float):
        node[key] = node[key] * rng.choice((-1, 0, 2, 10, 1000))
    elif isinstance(node[key], list):
        rng.shuffle(node[key])
    else:
        node[key] = [node[key]]
    return value


def split_file(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its tensors' bytes."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_file(header: Any, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def mutate_layout(rng: random.Random, content: bytes) -> bytes:
    """Edit the names, dtypes, shapes and places of a safetensors file's tensors."""
    header, tensors = split_file(content)
    return join_file(mutate_json(rng, header), tensors)


# ---- What is damaged, and what it must give -------------------------------------------------------


class Material:
    """The files to damage: a checkpoint of ours, a state, and a timm model with its config.json."""

    def __init__(self, folder: Path, best: Path, states: Path):
        self.folder = folder
        self.tried = folder / "tried"
        self.tried.mkdir(parents=True)
        self.best = best.read_bytes()
        self.header = checkpoint.read_header(best)
        self.tensors = read_tensors(best)[0]
        self.state = state.list_states(states)[0].read_bytes()
        torch.manual_seed(0)
        backbone = timm.create_model(MODEL.removeprefix("timm/"), num_classes=10)
        self.weights = safetensors.torch.save(unique_tensors(backbone.state_dict()))
        record = {key: value for key, value in backbone.pretrained_cfg.items() if value is not None}
        self.config = {
            "architecture": "test_resnet",
            "num_classes": 10,
            "model_args": {"global_pool": "avg", "act_layer": "relu", "drop_rate": 0.1},
            "pretrained_cfg": json.loads(json.dumps(record)),
        }
        self.accelerator = Accelerator(cpu=True)
        self.count = 0

    def write(self, content: bytes, name: str) -> Path:
        """Write a file in a folder of its own, as nothing may remember an earlier one."""
        self.count += 1
        folder = self.tried / str(self.count % 50)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / name
        path.write_bytes(content)
        return path

    def damage_checkpoint(self, rng: random.Random) -> str:
        """Return "right" or "altered". The methods below may return "other": an edited record is valid."""
        mutate = rng.choice((mutate_bytes, mutate_bytes, mutate_layout))
        path = self.write(mutate(rng, self.best), "c.safetensors")
        model, header = checkpoint.load_model(path)
        same = equal(model.state_dict(), self.tensors)
        same &= {**header, "clock": 0} == {**self.header, "clock": 0}
        return "right" if same else "altered"

    def edit_checkpoint(self, rng: random.Random) -> str:
        """Edit our header, and give it the digest that fits."""
        header = mutate_json(rng, self.header)
        if isinstance(header, dict):
            header["tensors_sha256"] = tensors_digest(self.tensors)
            header["header_sha256"] = header_digest(header)
        layout, tensors = split_file(self.best)
        layout["__metadata__"][HEADER_KEY] = json.dumps(header)
        path = self.write(join_file(layout, tensors), "c.safetensors")
        checkpoint.load_model(path)
        return self.evaluate(path) if rng.randrange(EVALUATED) == 0 else "other"

    def evaluate(self, path: Path) -> str:
        before = set(self.folder.rglob("*"))
        output = path.parent / "out"
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.main(["--ckpt", str(path), "--output-dir", str(output), "--limit-eval", "20"])
        new = set(self.folder.rglob("*")) - before
        return "other" if all(output in (file, *file.parents) for file in new) else "outside"

    def damage_state(self, rng: random.Random) -> str:
        digest = hashlib.sha256(self.state).hexdigest()[:16]
        return self.restore(rng.choice((mutate_bytes, mutate_layout))(rng, self.state), digest, "altered")

    def edit_state(self, rng: random.Random) -> str:
        """Edit the header of a state or its layout, and give the file the name that fits."""
        layout, tensors = split_file(self.state)
        if rng.random() < 0.3:
            content = mutate_layout(rng, self.state)
        else:
            header = json.loads(layout["__metadata__"]["state"])
            layout["__metadata__"]["state"] = json.dumps(mutate_json(rng, header))
            content = join_file(layout, tensors)
        return self.restore(content, hashlib.sha256(content).hexdigest()[:16], "other")

    def restore(self, content: bytes, digest: str, otherwise: str) -> str:
        path = self.write(content, f"step_00000001_{digest}.safetensors")
        model = models.build_model(**self.header["model"])
        arguments = json.loads(split_file(self.state)[0]["__metadata__"]["state"])["arguments"]
        states = state.States(
            path.parent,
            accelerator=self.accelerator,
            model=model,
            optimizer=build_optimizer(arguments["optimizer"], model, lr=0.1, weight_decay=0.0),
            ema=None,
            arguments=arguments,
            versions={},
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            restored = states.restore(force=False)
        if restored is None:
            return "passed over"
        return "right" if content == self.state else otherwise

    def edit_config(self, rng: random.Random) -> str:
        config = json.dumps(mutate_json(rng, self.config)).encode()
        content = mutate_bytes(rng, config) if rng.random() < 0.2 else config
        path = self.write(self.weights, "model.safetensors")
        path.with_name("config.json").write_bytes(content)
        self.use_weights(path)
        return "other"

    def damage_weights(self, rng: random.Random) -> str:
        """Weights have no digest: a flipped bit of a number is not seen."""
        path = self.write(rng.choice((mutate_bytes, mutate_layout))(rng, self.weights), "w.safetensors")
        self.use_weights(path)
        return "other"

    def use_weights(self, path: Path) -> None:
        found = models.find_weights(MODEL, str(path))
        size = models.default_image_size(MODEL, found)
        assert found.preprocessing is not None and size is not None
        with contextlib.redirect_stdout(io.StringIO()):
            model = models.build_model(MODEL, num_classes=10, image_size=min(size, 64), weights=found)
            with torch.no_grad():
                assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- The run -------------------------------------------------------------------------------------


class Slow(BaseException):
    """The time limit is over. No `except Exception` may catch this."""


def outcome_of(action: Callable[[random.Random], str], rng: random.Random) -> tuple[str, str]:
    """Return the outcome of one mutation, and a traceback or message."""

    def stop(signal_number: int, frame: object) -> None:
        raise Slow

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * LIMIT_SECONDS)  # for what waits and does not compute
    try:
        outcome, note = action(rng), ""
    except UserError as error:
        outcome, note = "refused", str(error)
    except Slow:
        outcome, note = "slow", traceback.format_exc()
    except BaseException:
        outcome, note = "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > LIMIT_KILOBYTES:
        outcome = "memory"
    return outcome, note


def fuzz(material: Material, mutations: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Return counts by (what, outcome), and a text for each outcome that is wrong."""
    actions = {
        "checkpoint, damaged": material.damage_checkpoint,
        "checkpoint, edited": material.edit_checkpoint,
        "state, damaged": material.damage_state,
        "state, edited": material.edit_state,
        "config.json": material.edit_config,
        "weights": material.damage_weights,
    }
    counts, failures = Counter(), []
    for number in range(mutations):
        what = list(actions)[number % len(actions)]
        outcome, note = outcome_of(actions[what], random.Random(f"{seed} {number}"))
        counts[what, outcome] += 1
        if outcome in BAD:
            failures.append(f"mutation {number}, {what}: {outcome}\n{note}")
    return counts, failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--mutations", type=int, default=10_000, help="in all (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cost.ROUND_SECONDS = 0.001  # nothing looks at the times
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = (
            "--model cnn_small --dataset digits --limit-train 96 --limit-eval 40 --epochs 1 --num-threads 1"
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([*flags.split(), "--output-dir", str(folder)])
        run = folder / "checkpoints" / "cnn_small"
        material = Material(folder / "fuzz", Path(f"{run}_best.safetensors"), Path(f"{run}_state"))
        start = time.monotonic()
        counts, failures = fuzz(material, args.mutations, args.seed)
    outcomes = sorted({outcome for _, outcome in counts})
    print(f"{'':22}" + "".join(f"{outcome:>12}" for outcome in outcomes))
    for what in dict.fromkeys(what for what, _ in counts):
        print(f"{what:22}" + "".join(f"{counts[what, outcome]:>12,}" for outcome in outcomes))
    seconds = time.monotonic() - start
    print(f"{args.mutations:,} mutations, seed {args.seed}, {seconds:.0f} s, {len(failures)} wrong")
    print("\n".join(failures[:20]), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
