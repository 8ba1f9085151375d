"""The feature cache gives the same bits as no cache, with views, kills, damaged files and two processes."""

import errno
import os
import shutil
import sys

import datasets
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from conftest import ROOT, assert_refused, call, command, make_image_folder, newest_step

from modeling import features, models, progression
from modeling.data import decoding
from modeling.data.images import Images
from modeling.data.resize import Preprocessing
from modeling.run import checkpoint

FLAGS = (
    "--model",
    "vit",
    "--weights",
    "none",
    "--dataset",
    "digits",
    "--image-size",
    32,
    "--limit-train",
    70,
    "--limit-eval",
    20,
)
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
def test_as_many_views_as_epochs_are_bitwise_the_head_without_a_cache(
    tmp_path, cache, monkeypatch, precision
):
    flags = ("--epochs", 3, "--mixed-precision", precision)
    cached = train(tmp_path / "cached", *flags, "--feature-views", 3)
    assert len(list(cache.glob("*/view_*"))) == 3
    one_each = train(tmp_path / "one_each", *flags, "--feature-views", 0)  # reads what the first wrote
    monkeypatch.setattr(progression, "open_features", lambda run: None)
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
    train(tmp_path / "alike", "--epochs", 3, "--augment", "none")  # the recipe's four views would be one
    assert sum(computed) == 250 + 70
    train(tmp_path / "other_batches", "--epochs", 1, "--batch-size", 10)
    # Another seed also divides the dataset differently, so all three splits have new features.
    train(tmp_path / "other_seed", "--epochs", 1, "--seed", 1)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 3 + 1 + 1 + 3


def test_epoch_e_sees_view_e_mod_k(tmp_path, cache, monkeypatch):
    seen = []
    original = features.FeatureViews.open

    def noted(self, name, batches):
        seen.append(name)
        return original(self, name, batches)

    monkeypatch.setattr(features.FeatureViews, "open", noted)
    train(tmp_path / "run", "--epochs", 5, "--feature-views", 2, "--batch-size", 70)
    expected = []
    for view in (0, 1, 0, 1, 0):
        expected += [f"view_{view}", "evaluation_64"]
    assert seen == [*expected, "evaluation_64"]


def test_a_view_of_the_wrong_length_is_computed_again(tmp_path, cache):
    flags = ("--epochs", 2, "--feature-views", 2)
    whole = train(tmp_path / "whole", *flags)
    for path in cache.glob("*/view_*"):
        os.truncate(path, 1000)
    assert same(whole, train(tmp_path / "again", *flags))


def test_a_view_of_other_bytes_is_computed_again(tmp_path, cache):
    flags = ("--epochs", 2, "--feature-views", 2)
    whole = train(tmp_path / "whole", *flags)
    for path in cache.glob("*/view_*"):
        path.write_bytes(bytes(path.stat().st_size))
    assert same(whole, train(tmp_path / "again", *flags))


def test_killed_and_resumed_it_ends_the_same(tmp_path, cache):
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    flags = [*FLAGS, "--epochs", 4, "--feature-views", 2, "--checkpoint-every", 1, "--output-dir", tmp_path]
    code = "import os, signal, sys; sys.path.insert(0, '.'); import train; step = train.train_step; n = [0]\n"
    code += "def killed(*a, **k):\n n[0] += 1\n out = step(*a, **k)\n"
    code += " n[0] == 7 and os.kill(os.getpid(), signal.SIGKILL)\n return out\n"
    code += "train.train_step = killed; train.main(sys.argv[1:])"
    assert command(sys.executable, "-c", code, *flags, cwd=ROOT, env=env).returncode == -9
    # The kill comes after step 7, in the second view. The newest state is that of step 6.
    assert newest_step(tmp_path / "checkpoints" / "vit_state") == 6
    resumed = command(sys.executable, "train.py", *flags, "--resume", env=env)
    assert resumed.returncode == 0 and "after step 6" in resumed.stdout, resumed.stderr
    resumed = head(tmp_path), metrics(tmp_path)
    (tmp_path / "cache").rename(tmp_path / "other")
    assert same(resumed, train(tmp_path / "uninterrupted", "--epochs", 4, "--feature-views", 2))


def test_a_view_that_is_lost_is_computed_again_in_the_batches_of_its_own_epoch(tmp_path, cache, monkeypatch):
    """The last bit of a feature depends on its batch, so a later epoch must compute it in the same batch."""
    flags = ("--epochs", 3, "--feature-views", 1)
    whole = train(tmp_path / "whole", *flags)
    original = features.ProbeFeatures.of_epoch

    def lost(self, epoch, on_batch):
        if epoch == 2:
            (path,) = cache.glob("*/view_0")
            path.unlink()
            self.views["train"].opened_name = ""
        return original(self, epoch, on_batch)

    monkeypatch.setattr(features.ProbeFeatures, "of_epoch", lost)
    assert same(whole, train(tmp_path / "lost", *flags))


def test_features_are_of_the_backbone_that_was_resumed(tmp_path, cache):
    weights = tmp_path / "weights.safetensors"
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = models.build_model("vit", num_classes=10, image_size=32)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        safetensors.torch.save_file(state, tmp_path / f"{seed}.safetensors")
    flags = ("--weights", weights, "--epochs", 3, "--feature-views", 3)
    shutil.copy(tmp_path / "0.safetensors", weights)
    expected = train(tmp_path / "whole", *flags)
    folders = sorted(cache.iterdir())
    stopped = call("train", *FLAGS, *flags, "--output-dir", tmp_path / "run")
    assert stopped.status == 0
    states = sorted((tmp_path / "run" / "checkpoints" / "vit_state").iterdir())
    states[-1].unlink()  # as if killed in the last epoch
    shutil.copy(tmp_path / "1.safetensors", weights)
    refused = call("train", *FLAGS, *flags, "--output-dir", tmp_path / "run", "--resume")
    assert_refused(refused, "weights file")
    assert same(expected, train(tmp_path / "run", *flags, "--resume", "--force"))
    assert sorted(cache.iterdir()) == folders


def test_other_preprocessing_code_or_images_have_other_features(tmp_path, cache, monkeypatch):
    model, rows = models.build_model("vit", num_classes=2, image_size=32), torch.arange(3)

    def folder(mean=0.5, origin="a", pixel=0):
        images = Images(
            torch.full((3, 3, 32, 32), pixel, dtype=torch.uint8),
            rows,
            torch.full((3, 2), 32),
            rows,
            rows,
            [],
            origin,
        )
        prep = Preprocessing(image_size=32, mean=(mean,) * 3, std=(0.5,) * 3)
        probe_features = features.ProbeFeatures(
            Accelerator(),
            model,
            {"train": images},
            prep,
            augment_name="light",
            seed=1,
            batch_size=2,
            accumulation=1,
            num_views=0,
            mixes=False,
        )
        return probe_features.views["train"].folder

    folders = [folder(), folder(mean=0.500001), folder(origin="b"), folder(pixel=1)]
    monkeypatch.setattr(features, "_CODE", ("randomness.py",))
    assert len({*folders, folder()}) == 5


def test_mixing_turns_the_recipes_views_off(tmp_path, cache):
    train(tmp_path, "--epochs", 2, "--mixup", 0.2)
    assert not list(cache.glob("*/view_*")) and list(cache.glob("*/evaluation_64"))


def test_images_whose_features_are_known_are_not_decoded(tmp_path, cache, monkeypatch):
    folder = make_image_folder(tmp_path / "images", {"train": {"a": 9, "b": 9}, "test": {"a": 3, "b": 3}})
    flags = (
        "--model",
        "vit",
        "--weights",
        "none",
        "--dataset",
        folder,
        "--image-size",
        32,
        "--epochs",
        2,
        "--store-limit",
        0,
    )
    whole = call("train", *flags, "--output-dir", tmp_path / "one")
    assert whole.status == 0 and "above --store-limit" in whole.out, whole.err
    decoded = []
    take = decoding.Decoder.take
    monkeypatch.setattr(
        decoding.Decoder, "take", lambda self, indices: decoded.append(indices) or take(self, indices)
    )
    assert call("train", *flags, "--output-dir", tmp_path / "two").status == 0
    # For the fingerprints of train and test, and for TensorBoard's grid; validation is in memory.
    assert len(decoded) == 3
    assert same(*((head(tmp_path / run), metrics(tmp_path / run)) for run in ("one", "two")))


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    result = call("train", *FLAGS, "--output-dir", tmp_path, "--epochs", 1)
    assert_refused(result, "cannot keep features in", "set HF_DATASETS_CACHE")


def test_an_image_that_only_fills_up_a_batch_is_not_kept(tmp_path, cache):
    model = models.build_model("vit", num_classes=2, image_size=32)
    images = Images(
        torch.zeros(3, 3, 32, 32, dtype=torch.uint8),
        torch.arange(3),
        torch.full((3, 2), 32),
        *[torch.arange(3)] * 2,
        ["a", "b"],
    )
    x = torch.randn(4, 3, 32, 32)
    views = features.FeatureViews(Accelerator(), model, images, [])
    view = views.open("view_0", lambda: iter([features.FeatureBatch(x, torch.tensor([2, -1, 0, 1]))]))
    assert torch.equal(view, model.features(x)[[2, 3, 0]])
    assert torch.equal(view, views.open("view_0", lambda: pytest.fail("it was kept")))


def test_a_full_disk_is_one_line(tmp_path, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features.tempfile, "NamedTemporaryFile", full)
    assert_refused(
        call("train", *FLAGS, "--output-dir", tmp_path, "--epochs", 1),
        "No space left",
        "in the folder of kept features",
        statuses=(1,),
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


def test_two_processes_agree_with_one_whether_they_share_the_cache_or_not(tmp_path, cache):
    flags = (*FLAGS[:-2], "--epochs", 4, "--feature-views", 2, "--num-threads", 1)
    code = "import os, sys; sys.path.insert(0, '.')\n"
    code += "if sys.argv.pop(1) == 'own': os.environ['HF_DATASETS_CACHE'] += os.environ['RANK']\n"
    (tmp_path / "worker.py").write_text(code + "import train; sys.exit(train.main(sys.argv[1:]))")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/multi_cpu.yaml",
        "--num_processes",
        2,
    ]
    ended = []
    for run, kind in enumerate(("shared", "shared", "own", "own")):
        env = {"HF_DATASETS_CACHE": str(tmp_path / kind), "ACCELERATE_USE_CPU": "true"}
        done = command(
            *launch, tmp_path / "worker.py", kind, *flags, "--output-dir", tmp_path / f"run{run}", env=env
        )
        assert done.returncode == 0, done.stderr
        ended.append((head(tmp_path / f"run{run}"), metrics(tmp_path / f"run{run}")))
    assert all(same(ended[0], other) for other in ended[1:])
    assert (tmp_path / "own0").exists() and (tmp_path / "own1").exists()
    one = call("train", *flags, "--output-dir", tmp_path / "one")
    assert one.status == 0, one.err
    for mine, theirs in zip(head(tmp_path / "one"), ended[0][0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)  # the batches differ by a last bit
