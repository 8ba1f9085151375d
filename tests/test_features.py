"""The feature cache: the same bits as without it, through views, kills and damaged files, on one process and two."""

import errno
import os
import sys

import datasets
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, assert_refused, call, command, newest_step, scripts

from modeling import checkpoint, features

FLAGS = ("--model", "vit", "--weights", "none", "--dataset", "digits", "--image-size", 32, "--limit-train", 70, "--limit-eval", 20)
FLAGS += ("--batch-size", 16, "--lr", 0.5, "--head-dropout", 0.1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "features"


def head(folder, run="vit", kind="final"):
    state = checkpoint.load_model(folder / "checkpoints" / f"{run}_{kind}.safetensors")[0].state_dict()
    return state["head.weight"], state["head.bias"]


def metrics(folder, run="vit"):
    return (folder / "runs" / run / "metrics.jsonl").read_text()


def train(folder, *flags):
    result = call("train", *FLAGS, "--output-dir", folder, *flags)
    assert result.status == 0, result.err
    return head(folder), metrics(folder)


def same(one, other):
    return all(map(torch.equal, one[0], other[0])) and one[1] == other[1]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_as_many_views_as_epochs_are_bitwise_the_head_without_a_cache(tmp_path, cache, monkeypatch, precision):
    flags = ("--epochs", 3, "--mixed-precision", precision)
    cached = train(tmp_path / "cached", *flags, "--feature-views", 3)
    assert len(list(cache.glob("*/view_*"))) == 3
    one_each = train(tmp_path / "one_each", *flags, "--feature-views", 0)  # reads what the first wrote
    monkeypatch.setattr(features, "open_caches", lambda *_: {})
    plain = train(tmp_path / "plain", *flags)
    assert same(cached, plain) and same(one_each, plain)
    assert not torch.equal(cached[0][0], torch.zeros_like(cached[0][0]))


def test_each_view_is_computed_once_by_any_number_of_runs(tmp_path, cache, monkeypatch):
    computed = []
    original = features.ViTLinearProbe.features

    def counted(self, x):
        computed.append(len(x))
        return original(self, x)

    monkeypatch.setattr(features.ViTLinearProbe, "features", counted)
    first = train(tmp_path / "first", "--epochs", 5, "--feature-views", 2)
    assert sum(computed) == 2 * 70 + 20 + 20  # two views of train; validation and test once
    assert same(first, train(tmp_path / "again", "--epochs", 5, "--feature-views", 2))
    train(tmp_path / "faster", "--epochs", 4, "--feature-views", 2, "--lr", 0.1)
    assert sum(computed) == 180
    train(tmp_path / "more", "--epochs", 3, "--feature-views", 3)
    assert sum(computed) == 180 + 70
    train(tmp_path / "other_batches", "--epochs", 1, "--batch-size", 10)
    train(tmp_path / "other_seed", "--epochs", 1, "--seed", 1)
    assert len(list(cache.iterdir())) == 3 + 1 + 3  # another seed divides the dataset elsewhere, too


def test_epoch_e_sees_view_e_mod_k(tmp_path, cache, monkeypatch):
    seen = []
    get = features.FeatureCache.get

    def noted(self, name, *rest):
        seen.append(name)
        return get(self, name, *rest)

    monkeypatch.setattr(features.FeatureCache, "get", noted)
    train(tmp_path / "run", "--epochs", 5, "--feature-views", 2, "--batch-size", 70)
    assert seen == [n for view in (0, 1, 0, 1, 0) for n in (f"view_{view}", "evaluation_64")] + ["evaluation_64"]


def test_damaged_rows_are_computed_again(tmp_path, cache):
    whole = train(tmp_path / "whole", "--epochs", 2, "--feature-views", 2)
    for path in cache.glob("*/view_*"):
        content = bytearray(path.read_bytes())
        content[1000:5000] = os.urandom(4000)
        content[20000:30000] = bytes(10000)
        path.write_bytes(content)
    assert same(whole, train(tmp_path / "again", "--epochs", 2, "--feature-views", 2))


def test_killed_and_resumed_it_ends_the_same(tmp_path, cache):
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    flags = [*FLAGS, "--epochs", 4, "--feature-views", 2, "--checkpoint-every", 1, "--output-dir", tmp_path]
    code = "import os, signal, sys; sys.path.insert(0, '.'); import train; step = train.train_step; n = [0]\n"
    code += "def killed(*a, **k):\n n[0] += 1\n out = step(*a, **k)\n n[0] == 7 and os.kill(os.getpid(), signal.SIGKILL)\n return out\n"
    code += "train.train_step = killed; train.main(sys.argv[1:])"
    assert command(sys.executable, "-c", code, *flags, cwd=ROOT, env=env).returncode == -9
    assert newest_step(tmp_path / "checkpoints" / "vit_state") == 6  # in the second view, whose seventh step the cache has
    resumed = command(sys.executable, "train.py", *flags, "--resume", env=env)
    assert resumed.returncode == 0 and "after step 6" in resumed.stdout, resumed.stderr
    resumed = head(tmp_path), metrics(tmp_path)
    (tmp_path / "cache").rename(tmp_path / "other")
    assert same(resumed, train(tmp_path / "uninterrupted", "--epochs", 4, "--feature-views", 2))


def test_a_row_of_weight_zero_is_not_kept(tmp_path, cache):
    model = scripts.train.models.build_model("vit", num_classes=2, image_size=32)
    images = scripts.train.data.Images(
        torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.arange(3), torch.full((3, 2), 32), *[torch.arange(3)] * 2, ["a", "b"]
    )
    kept = features.FeatureCache(Accelerator(), model, images)
    x = torch.randn(3, 3, 32, 32)
    first = kept.get("view_0", torch.arange(3), torch.tensor([1.0, 0.0, 1.0]), lambda: x)
    assert torch.equal(kept.get("view_0", torch.tensor([2, 0]), torch.ones(2), lambda: pytest.fail("it was kept")), first[[2, 0]])
    assert len(kept.get("view_0", torch.tensor([1]), torch.ones(1), lambda: x[1:2])) == 1
    kept.get("view_0", torch.tensor([1]), torch.ones(1), lambda: pytest.fail("it was kept"))


def test_a_full_disk_is_one_line(tmp_path, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert_refused(
        call("train", *FLAGS, "--output-dir", tmp_path, "--epochs", 1), "No space left", "where features are kept", statuses=(1,)
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--model", "cnn_small", "--image-size", 32), "the backbone of cnn_small is not frozen"),
        (("--mixup", 0.2), "mixup and cutmix blend images"),
    ],
)
def test_views_that_cannot_be_kept_are_refused(tmp_path, flags, words):
    flags = (*FLAGS[:-2], *flags, "--feature-views", 2, "--epochs", 1, "--output-dir", tmp_path)
    assert_refused(call("train", *flags), words, "--feature-views 0")


def test_two_processes_share_the_cache_and_agree_with_one(tmp_path, cache):
    flags = (*FLAGS[:-2], "--epochs", 4, "--feature-views", 2, "--num-threads", 1)
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/multi_cpu.yaml",
        "--num_processes",
        2,
    ]
    two = [command(*launch, "train.py", *flags, "--output-dir", tmp_path / f"two{i}", env=env) for i in range(2)]
    assert all(run.returncode == 0 for run in two), two[0].stderr
    assert same(*((head(tmp_path / f"two{i}"), metrics(tmp_path / f"two{i}")) for i in range(2)))
    one = call("train", *flags, "--output-dir", tmp_path / "one")
    assert one.status == 0, one.err
    for mine, theirs in zip(head(tmp_path / "one"), head(tmp_path / "two0"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
