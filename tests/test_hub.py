"""Datasets and weights from a hub on this machine: commands online and offline, and the ways a hub fails."""

import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import test_processes
import timm
import torch
from conftest import ROOT, assert_refused, call, command
from hub import Hub, Repository
from huggingface_hub import constants
from PIL import Image
from sklearn.datasets import load_digits

import modeling.hub
from modeling import models
from modeling.data.known import KNOWN
from modeling.data.sources import load_source
from modeling.hub import download
from modeling.models import backbones
from modeling.run import checkpoint

STL10, CIFAR10 = (list(known.classes) for known in KNOWN if known.hub_id)
TIMM_IDS = {name: backbones.pretrained_config(name).hf_hub_id for name in ("vit", "deit", "resnet18")}


@functools.cache
def parquet_repository(
    classes: tuple[str, ...], side: int, image: str, label: str, num_train=12, num_test=4
) -> dict[str, bytes]:
    """Digits under other names: a parquet file for each split, and a README.md as push_to_hub writes it."""
    pixels = load_digits().images.astype("uint8") * 15
    files, start = {}, 0
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(classes))})
    for split, count in (("train", num_train), ("test", num_test)):
        rows = range(start, start := start + count)
        images = [Image.fromarray(pixels[i]).resize((side, side)).convert("RGB") for i in rows]
        split_data = datasets.Dataset.from_dict(
            {image: images, label: [i % len(classes) for i in rows]}, features=features
        )
        split_data.to_parquet(buffer := io.BytesIO())
        files[f"data/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    names = "".join(f"\n          '{n}': {name}" for n, name in enumerate(classes))
    paths = "".join(f"\n  - split: {split}\n    path: data/{split}-*" for split in ("train", "test"))
    files["README.md"] = (
        f"---\ndataset_info:\n  features:\n  - name: {image}\n    dtype: image\n"
        f"  - name: {label}\n    dtype:\n      class_label:\n"
        f"        names:{names}\nconfigs:\n- config_name: default\n  data_files:{paths}\n---\n"
    ).encode()
    return files


@functools.cache
def timm_weights(name: str) -> bytes:
    torch.manual_seed(3)
    return safetensors.torch.save(timm.create_model(name, pretrained=False).state_dict())


@pytest.fixture
def hub():
    stl10 = parquet_repository(tuple(STL10), 96, "image", "label")
    repositories = {
        "datasets/tanganke/stl10": Repository(
            [parquet_repository(tuple(STL10), 96, "image", "label", num_train=10), stl10], {"v1": 0}
        ),
        "datasets/uoft-cs/cifar10": Repository([parquet_repository(tuple(CIFAR10), 32, "img", "label")]),
        "datasets/someone/private": Repository([stl10], token="hf_secret"),
    }
    for name, hub_id in TIMM_IDS.items():
        repositories[f"models/{hub_id}"] = Repository(
            [{"model.safetensors": timm_weights(backbones.timm_name(name))}]
        )
    with Hub(repositories) as server:
        yield server


@pytest.fixture
def home(hub, tmp_path, monkeypatch) -> Path:
    """This process is online, and asks that hub; an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    return tmp_path / "home"


def environment(hub, home) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


FEW = ("--max-steps", 1, "--num-workers", 0)


# ---- the default commands ----------------------------------------------------------------------------------


def test_the_literal_command_online_and_offline(hub, tmp_path):
    """accelerate launch train.py --model vit --lr 0.01, in a copy of the project, online and then offline."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "modeling", clone / "modeling")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, clone)
    literal = (Path(sys.executable).parent / "accelerate", *"launch train.py --model vit --lr 0.01".split())
    env = environment(hub, tmp_path / "home")
    online = command(*literal, cwd=clone, env=env)
    assert online.returncode == 0, online.stderr
    assert f"weights {TIMM_IDS['vit']} at" in online.stdout
    assert "input      224 px, crop 0.9, bicubic, mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in online.stdout
    assert "Best epoch" in online.stdout
    asked = len(hub.asked)
    env |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    offline = command(*literal, "--run-name", "offline", cwd=clone, env=env)
    assert offline.returncode == 0, offline.stderr
    assert len(hub.asked) == asked
    assert "\x1b[" not in offline.stdout + offline.stderr
    lines = [(clone / "runs" / run / "metrics.jsonl").read_text() for run in ("vit", "offline")]
    assert lines[0] == lines[1]
    header = checkpoint.read_header(clone / "checkpoints" / "vit_best.safetensors")
    repository = hub.repositories["datasets/tanganke/stl10"]
    assert header["dataset"]["revision"] == repository.sha(1)
    assert header["weights"] == {
        "source": TIMM_IDS["vit"],
        "revision": hub.repositories[f"models/{TIMM_IDS['vit']}"].sha(0),
    }
    assert header["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    # main has moved on, the hub is gone and nothing says offline: the checkpoint's own revision is evaluated
    env |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = command(
        sys.executable, "evaluate.py", "--ckpt", "checkpoints/vit_best.safetensors", cwd=clone, env=env
    )
    assert result.returncode == 0, result.stderr
    assert "test of tanganke/stl10, 4 images" in result.stdout
    result = command(sys.executable, "export_data.py", cwd=clone, env=env)
    assert result.returncode == 0, result.stderr
    assert json.loads((clone / "data" / "manifest.json").read_text())["revision"] == repository.sha(1)


@pytest.mark.parametrize(
    "flags", [("--dataset", "cifar10", "--model", "deit"), ("--model", "resnet18")], ids=["deit", "resnet18"]
)
def test_other_models_online_and_offline(hub, home, tmp_path, monkeypatch, flags):
    online = call("train", *flags, *FEW, "--output-dir", tmp_path)
    assert online.status == 0, online.err
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = call("train", *flags, *FEW, "--output-dir", tmp_path, "--run-name", "offline")
    assert offline.status == 0, offline.err
    assert len(hub.asked) == asked
    runs = [(tmp_path / "runs" / run / "metrics.jsonl").read_text() for run in (flags[-1], "offline")]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("size", [224, 96])
@pytest.mark.parametrize("name", TIMM_IDS)
def test_the_hubs_weights_are_what_timm_itself_loads(hub, home, name, size):
    size = 224 if name == "resnet18" else size
    kwargs = {} if name == "resnet18" else {"img_size": size}
    reference = timm.create_model(
        backbones.timm_name(name), pretrained=True, num_classes=0, **kwargs
    ).state_dict()
    weights = models.find_weights(name, "default")
    model = models.build_model(name, num_classes=10, image_size=size, weights=weights.path)
    ours = getattr(model, "backbone", model).state_dict()
    assert len(reference) > 100
    for key, value in reference.items():
        assert torch.equal(ours[key], value), key


def test_hf_hub_weights_bring_their_own_preprocessing(hub, home, tmp_path):
    own = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "input_size": [3, 224, 224],
    }
    files = {"model.safetensors": timm_weights("resnet18")}
    config = {"architecture": "resnet18", "pretrained_cfg": own}
    hub.repositories["models/me/mine"] = Repository(
        [{**files, "config.json": json.dumps(config).encode()}, files]
    )
    sha = hub.repositories["models/me/mine"].sha(0)
    flags = (
        "--model",
        "resnet18",
        "--dataset",
        "digits",
        "--limit-train",
        20,
        "--limit-eval",
        10,
        *FEW,
        "--output-dir",
        tmp_path,
    )
    result = call("train", *flags, "--weights", f"hf-hub:me/mine@{sha}")
    assert result.status == 0, result.err
    assert f"weights me/mine at {sha[:7]}" in result.out
    assert "input      224 px, crop 1, bilinear, mean 0.1 0.2 0.3, std 0.4 0.5 0.6" in result.out
    header = checkpoint.read_header(tmp_path / "checkpoints" / "resnet18_best.safetensors")
    assert header["preprocessing"]["std"] == [0.4, 0.5, 0.6]
    assert header["weights"] == {"source": "me/mine", "revision": sha}
    # a checkpoint of ours as the first weights brings what it was trained with
    again = models.find_weights("resnet18", str(tmp_path / "checkpoints" / "resnet18_best.safetensors"))
    assert again.preprocessing.mean == (0.1, 0.2, 0.3)
    assert models.find_weights("resnet18", "hf-hub:me/mine").preprocessing.mean == (0.485, 0.456, 0.406), (
        "without config.json"
    )
    hub.repositories["models/me/other"] = Repository([{"config.json": b"{}", "pytorch_model.bin": b""}])
    assert_refused(
        call("train", *flags, "--weights", "hf-hub:me/other"),
        "model me/other has no model.safetensors",
        "--weights none",
    )
    assert_refused(
        call("train", *flags, "--model", "deit", "--weights", f"hf-hub:me/mine@{sha}"),
        "is a resnet18, not deit",
    )


# ---- revisions, promises, tokens ---------------------------------------------------------------------------


def test_a_revision_is_what_was_asked_for_offline_too(hub, home, monkeypatch):
    old = load_source("stl10@v1")
    assert (len(old.splits["train"]), old.revision) == (
        10,
        hub.repositories["datasets/tanganke/stl10"].sha(0),
    )
    new = load_source("tanganke/stl10")
    assert (len(new.splits["train"]), new.revision) == (
        12,
        hub.repositories["datasets/tanganke/stl10"].sha(1),
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(load_source(f"tanganke/stl10@{old.revision}").splits["train"]) == 10
    assert len(load_source("stl10@v1").splits["train"]) == 10
    assert len(load_source("stl10").splits["train"]) == 12
    with pytest.raises(
        ValueError,
        match="stl10@v2 is not available from the hub: HF_HUB_OFFLINE is set, and some of its files are not",
    ):
        load_source("stl10@v2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="stl10@v2 is not available from the hub: it has no such revision"):
        load_source("stl10@v2")


@pytest.mark.parametrize(
    "classes, side, words",
    [
        (CIFAR10, 96, "has the classes"),
        (STL10, 64, r"has the image size \(64, 64\), where \(96, 96\) was promised"),
    ],
)
def test_what_an_alias_promises_is_checked(hub, home, classes, side, words):
    hub.repositories["datasets/tanganke/stl10"] = Repository(
        [parquet_repository(tuple(classes), side, "image", "label")]
    )
    with pytest.raises(ValueError, match=words):
        load_source("stl10")


def test_a_missing_split_breaks_the_promise(hub, home):
    files = {
        name: content
        for name, content in parquet_repository(tuple(CIFAR10), 32, "img", "label").items()
        if "train" in name
    }
    hub.repositories["datasets/uoft-cs/cifar10"] = Repository([files])
    with pytest.raises(
        ValueError, match=r"has the splits \['train'\], where \['test', 'train'\] was promised"
    ):
        load_source("cifar10")


def test_hf_token_opens_a_private_repository(hub, home, monkeypatch):
    with pytest.raises(
        ValueError,
        match=r"private is not available from the hub: the hub answered 401, so .* needs a token; .*HF_TOKEN",
    ):
        load_source("someone/private")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(load_source("someone/private").splits["train"]) == 12


# ---- failures ----------------------------------------------------------------------------------------------

FILES = "/resolve/.*(parquet|safetensors)"
WAYS_OUT = {
    "stl10": ("--dataset digits or a local folder", "HF_HUB_OFFLINE=1"),
    "vit": ("--weights none", "--weights FILE", "HF_HUB_OFFLINE=1"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", WAYS_OUT)
@pytest.mark.parametrize(
    "paths, kind, words",
    [
        ("{}", "404", "the hub answered 404"),
        ("{}", "401", "the hub answered 401"),
        ("{}", "500", "the hub answered 500"),
        ("{}", "stall", "the hub does not answer"),
        ("{}.*" + FILES, "404", "the hub answered 404"),
        ("{}.*" + FILES, "stall", "the hub does not answer"),
        ("{}.*" + FILES, "cut", "peer closed connection"),
    ],
    ids=lambda value: (
        value.replace("{}", "all").partition(".*")[0] if "{}" in value else value.split(" ")[-1]
    ),
)
def test_a_failing_hub_is_one_line_within_a_minute(hub, home, tmp_path, what, paths, kind, words):
    name = {"stl10": "tanganke/stl10", "vit": TIMM_IDS["vit"]}[what]
    hub.fail(paths.format(re.escape(name)), kind)
    result = call("train", "--model", "vit", *FEW, "--output-dir", tmp_path)
    assert_refused(result, f"{name} is not available from the hub", words, *WAYS_OUT[what])
    assert not (tmp_path / "checkpoints").exists()
    # nothing half-downloaded is taken for whole: with a hub that is well it works
    hub.failures.clear()
    assert not constants.HF_HUB_OFFLINE  # the silence holds for the one command
    assert models.find_weights("vit", "default").path.read_bytes() == timm_weights("vit_tiny_patch16_224")
    assert len(load_source("stl10").splits["train"]) == 12


@pytest.mark.parametrize(
    "paths, kind, times",
    [("/api/", "500", 2), ("/api/", "stall", 1), (FILES, "500", 2), (FILES, "stall", 1), (FILES, "cut", 1)],
)
def test_a_passing_failure_is_survived(hub, home, paths, kind, times):
    hub.fail(paths, kind, times)
    assert models.find_weights("vit", "default").path.read_bytes() == timm_weights("vit_tiny_patch16_224")
    assert len(load_source("stl10").splits["test"]) == 4


def test_a_hub_that_fails_serves_what_is_cached(hub, home):
    assert load_source("stl10").revision
    for kind in ("500", "401", "stall"):
        hub.failures.clear()
        hub.fail(".", kind)
        assert len(load_source("stl10").splits["train"]) == 12


def test_a_silent_hub_is_left_alone_for_one_command_and_asked_by_the_next(hub, home, monkeypatch):
    load_source("stl10")
    hub.fail(FILES, "stall")
    monkeypatch.setattr(modeling.hub, "QUIET_ANSWERS", 0)  # the second request without an answer is too many
    with modeling.hub.one_command():
        with pytest.raises(ValueError, match="the hub does not answer"):
            load_source("cifar10")
        asked = len(hub.asked)
        assert len(load_source("stl10").splits["train"]) == 12  # from the cache
        with pytest.raises(ValueError, match="the hub does not answer"):
            load_source("cifar10")
        assert len(hub.asked) == asked
    assert not constants.HF_HUB_OFFLINE
    hub.failures.clear()
    monkeypatch.setattr(modeling.hub, "QUIET_ANSWERS", 5)
    assert len(load_source("cifar10").splits["train"]) == 12


def test_the_quiet_clock_starts_at_a_request(hub, home, monkeypatch):
    """A process waits for the lock of another one that downloads, for longer than a hub may be silent."""
    real = modeling.hub.WeakFileLock

    def slow_lock(path):
        time.sleep(1.2)
        return real(path)

    monkeypatch.setattr(modeling.hub, "WeakFileLock", slow_lock)
    monkeypatch.setattr(modeling.hub, "QUIET_ANSWERS", 1)
    assert len(load_source("stl10").splits["train"]) == 12


def test_a_slow_hub_is_not_a_dead_one(hub, home):
    """More files than are fetched at once. Each takes over 5 seconds, the silence that ends a download."""
    names = [f"data/{n}.bin" for n in range(10)]
    hub.repositories["datasets/me/many"] = Repository([{name: os.urandom(7 << 16) for name in names}])
    hub.slow_seconds = 0.9
    folder = download("me/many", repo_type="dataset")
    assert all((folder / name).stat().st_size == 7 << 16 for name in names)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("name", ["own/x..y", "a--b/c", "own/x.git", "my--data", "n" * 120])
def test_a_name_that_the_hub_cannot_have(hub, home, tmp_path, monkeypatch, name, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert_refused(call("train", "--dataset", name), f"dataset '{name}' is not a hub name")
    assert_refused(
        call("train", "--model", "vit", "--weights", f"hf-hub:{name}"),
        f"model '{name}' is not a hub name",
    )


def test_a_cache_that_cannot_be_written_serves_what_it_has(hub, home, monkeypatch):
    """As a read-only one of a cluster: nobody can take the lock."""
    assert len(load_source("stl10").splits["train"]) == 12

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "lock")

    monkeypatch.setattr(modeling.hub, "WeakFileLock", refuse)
    assert len(load_source("stl10").splits["train"]) == 12
    with pytest.raises(PermissionError):
        load_source("cifar10")


def test_without_network_the_error_names_the_ways_out(tmp_path):
    """As a user sees it, in a process of its own."""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    result = command(sys.executable, ROOT / "train.py", "--model", "vit", cwd=tmp_path, env=env, timeout=60)
    assert_refused(
        result,
        f"model {TIMM_IDS['vit']} is not available from the hub: the hub cannot be reached",
        *WAYS_OUT["vit"],
    )


DOWNLOAD = "from modeling.hub import download; print(download('tanganke/stl10', repo_type='dataset').name)"


def start_download(hub, home) -> subprocess.Popen:
    env = os.environ | environment(hub, home)
    return subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_of_several_processes_one_downloads(hub, tmp_path):
    hub.slow_seconds = 0.3
    processes = [start_download(hub, tmp_path / "home") for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == hub.repositories["datasets/tanganke/stl10"].sha(1)
    assert len(hub.downloads()) == len(set(hub.downloads())) == 3


def test_ranks_wait_for_a_slow_download_outside_of_any_collective(hub, tmp_path):
    """A download that takes longer than a collective may: none is under way meanwhile."""
    hub.slow_seconds = 0.04  # the weights are 350 pieces: 14 seconds
    patience = "import datetime; cli.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=9)\n"
    flags = (
        "--model",
        "vit",
        "--dataset",
        "digits",
        "--limit-train",
        8,
        "--limit-eval",
        4,
        "--batch-size",
        4,
        *FEW,
        "--output-dir",
        tmp_path,
    )
    env = environment(hub, tmp_path / "home")
    port = test_processes.free_port()
    options = dict(before=patience, **env)
    ranks = [test_processes.start_rank(rank, 2, port, "train", flags, **options) for rank in range(2)]
    test_processes.finish(ranks)
    assert len(hub.downloads()) == 1


def test_a_download_that_is_killed_leaves_nothing_that_passes_for_whole(hub, tmp_path, home, monkeypatch):
    hub.slow_seconds = 0.5
    process = start_download(hub, home)
    deadline = time.monotonic() + 60
    while not hub.downloads() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.slow_seconds = 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="some of its files are not cached"):
        download("tanganke/stl10", repo_type="dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = download("tanganke/stl10", repo_type="dataset")
    for name, content in hub.repositories["datasets/tanganke/stl10"].commits[1].items():
        assert (folder / name).read_bytes() == content
