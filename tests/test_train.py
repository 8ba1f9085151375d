"""train.py: every flag does what its help says; equal runs are equal; what it writes can be read back."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import TINY, assert_refused, call, make_image_folder, scripts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modeling import recipes, setup
from modeling.data import decoding
from modeling.data.division import select_rows
from modeling.data.images import Images, decode
from modeling.data.resize import Preprocessing
from modeling.data.sources import load_source
from modeling.run import checkpoint


def run(folder, *flags, name="cnn_small"):
    """Train. Return the epochs' records, the headers and weights of both checkpoints, and the output."""
    result = call("train", *TINY, *flags, "--output-dir", folder)
    assert result.status == 0, result.err
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    out = SimpleNamespace(
        out=result.out, err=result.err, epochs=[x for x in lines if x["kind"] == "epoch"], test=lines[-1]
    )
    for kind in ("best", "final"):
        path = folder / "checkpoints" / f"{name}_{kind}.safetensors"
        setattr(out, kind, checkpoint.read_header(path))
        setattr(out, f"{kind}_weights", safetensors.torch.load_file(path))
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"), "--epochs", 2)


def test_a_run_writes_what_the_readme_says(trained):
    names = {
        p.relative_to(trained.folder).as_posix()
        for p in trained.folder.rglob("*")
        if p.is_file() and "traces" not in p.parts
    }
    events = {name for name in names if "events.out.tfevents" in name}
    states = {name for name in names if name.startswith("checkpoints/cnn_small_state/step_0000000")}
    assert len(states) == 2
    assert names - events - states == {
        "checkpoints/cnn_small_best.safetensors",
        "checkpoints/cnn_small_final.safetensors",
        "runs/cnn_small/metrics.jsonl",
        "runs/cnn_small/curves.png",
    }
    assert len(events) == 1
    log = EventAccumulator(str(trained.folder / "runs" / "cnn_small"), size_guidance={"images": 0}).Reload()
    tags = log.Tags()
    assert [event.step for event in log.Images("training_images")] == [0]
    assert [event.step for event in log.Images("confusion_matrix/validation")] == [3, 6, 9]
    assert "_hparams_/session_start_info" in log.summary_metadata
    for tag in (
        "loss/train",
        "loss/validation",
        "accuracy/train",
        "accuracy/validation",
        "learning_rate",
        "accuracy/test",
        "gradient_norm/mean",
        "gradient_norm/largest",
        "speed/images_per_second",
        "speed/data_wait_share",
        "final/test_accuracy",
    ):
        assert tag in tags["scalars"]
    for tag in ("weights/features.0.weight", "gradients/features.0.weight", "gradients/classifier.4.bias"):
        assert tag in tags["histograms"]
    for text in (
        "96 train, 40 validation, 40 test",
        "545,098 parameters",
        "test accuracy",
        "tensorboard --logdir",
        f"Next: python evaluate.py --ckpt {trained.best} --output-dir {trained.folder}",
    ):
        assert text in trained.out


def test_the_header_describes_the_run(trained):
    header = checkpoint.read_header(trained.best)
    assert header["model"] == {
        "name": "cnn_small",
        "num_classes": 10,
        "image_size": 32,
        "channels": [32, 64],
        "batch_norm": False,
        "pool": None,
        "kaiming": False,
        "hidden": 128,
        "head_dropout": 0.0,
    }
    arguments = header["arguments"]
    given = dict(
        epochs=3,
        batch_size=32,
        lr=1e-3,
        optimizer="adam",
        augment="none",
        schedule="constant",
        seed=42,
        run_name="cnn_small",
    )
    assert {key: arguments[key] for key in given} == given
    assert None not in [
        arguments[key]
        for key in ("weight_decay", "mixup", "ema", "image_size", "val_fraction", "mixed_precision")
    ]
    assert header["dataset"]["name"] == "digits"
    assert header["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert header["metrics"].keys() >= {"loss", "accuracy", "macro_f1"}
    assert header["clock"]["train_seconds"] > 0


def test_equal_commands_write_equal_files(tmp_path):
    flags = ("--epochs", 2, "--augment", "standard", "--mixup", 0.2, "--head-dropout", 0.3, "--ema", 0.9)
    one, two = run(tmp_path / "1", *flags), run(tmp_path / "2", *flags)
    assert (tmp_path / "1/runs/cnn_small/metrics.jsonl").read_bytes() == (
        tmp_path / "2/runs/cnn_small/metrics.jsonl"
    ).read_bytes()
    for kind in ("best", "final"):
        a, b = vars(one)[kind], vars(two)[kind]
        assert a.pop("clock") != b.pop("clock")
        assert a == b
        a, b = vars(one)[f"{kind}_weights"], vars(two)[f"{kind}_weights"]
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_epochs_and_max_steps(plain, tmp_path):
    assert [(r["epoch"], r["step"]) for r in plain.epochs] == [(1, 3), (2, 6)]
    short = run(tmp_path, "--epochs", 9, "--max-steps", 4)
    assert [(r["epoch"], r["step"]) for r in short.epochs] == [(1, 3), (2, 4)]
    assert (short.final["step"], short.final["arguments"]["epochs"]) == (4, 2)


def test_min_steps_of_a_recipe_adds_epochs(monkeypatch, tmp_path):
    recipe = recipes.REFERENCE["cnn_small", "small"]
    recipe = dataclasses.replace(recipe, epochs=1, min_steps=7, warmup_epochs=1)
    monkeypatch.setitem(recipes.REFERENCE, ("cnn_small", "small"), recipe)
    result = run(tmp_path / "recipe")
    assert [(r["epoch"], r["step"]) for r in result.epochs] == [(1, 3), (2, 6), (3, 9)]
    assert result.final["arguments"]["epochs"] == 3
    assert len(run(tmp_path / "flag", "--epochs", 1).epochs) == 1
    few = run(tmp_path / "steps", "--max-steps", 2).final
    assert (few["step"], few["arguments"]["warmup_epochs"]) == (2, 1)


def test_a_run_that_ends_within_its_warm_up_says_so(tmp_path):
    flags = (*TINY, "--max-steps", 1, "--lr", 0.5, "--warmup-epochs", 5, "--output-dir", tmp_path)
    assert ", only warm-up, to 0." in call("train", *flags).out


def test_min_steps_stretches_the_warm_up_too():
    recipe = recipes.Recipe(optimizer="adamw", lr=1, epochs=5, warmup_epochs=1, min_steps=100, batch_size=8)
    few, many = recipe.stretched(steps_per_epoch=10), recipe.stretched(steps_per_epoch=50)
    assert (few.epochs, few.warmup_epochs) == (10, 2) and many == recipe


def test_lr_and_warmup(plain, tmp_path):
    assert plain.epochs[-1]["learning_rate"] == 1e-3
    assert run(tmp_path, "--max-steps", 1, "--lr", 0.03).epochs[0]["learning_rate"] == 0.03
    assert run(tmp_path, "--max-steps", 4, "--lr", 0.03, "--warmup-epochs", 2).epochs[0][
        "learning_rate"
    ] == pytest.approx(0.015)


@pytest.mark.parametrize(
    "flags",
    [
        ("--augment", "light"),
        ("--augment", "standard"),
        ("--augment", "randaugment"),
        ("--label-smoothing", 0.1),
        ("--mixup", 0.4),
        ("--cutmix", 1.0),
        ("--optimizer", "sgd"),
        ("--weight-decay", 0.5),
        ("--clip-grad", 1e-4, "--optimizer", "sgd"),
        ("--head-dropout", 0.5),
        ("--seed", 7),
        ("--mixed-precision", "bf16"),
        ("--batch-size", 48),
        ("--limit-train", 64),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_a_flag_changes_the_training_and_is_in_the_header(plain, tmp_path, flags):
    other = run(tmp_path, "--epochs", 2, *flags)
    assert other.epochs[-1]["train_loss"] != plain.epochs[-1]["train_loss"]
    recorded = other.best["arguments"] | other.best["model"]
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        assert recorded[flag[2:].replace("-", "_")] == value
    if flags[0] == "--clip-grad":  # steps of at most lr x 1e-4 x (1 + momentum ...) go nowhere
        assert other.epochs[1]["train_loss"] == pytest.approx(other.epochs[0]["train_loss"], rel=1e-3)


def test_accumulation_and_workers_change_nothing(plain, tmp_path):
    other = run(tmp_path, "--epochs", 2, "--gradient-accumulation-steps", 4, "--num-workers", 1)
    assert "32 = processes 1 x accumulation 4 x micro-batch 8" in other.out
    assert [r["train_loss"] for r in other.epochs] == pytest.approx(
        [r["train_loss"] for r in plain.epochs], rel=1e-4
    )


def test_decoding_uses_num_workers_threads(tmp_path, monkeypatch):
    seen = []
    pool = decoding.ThreadPoolExecutor
    monkeypatch.setattr(decoding, "ThreadPoolExecutor", lambda n: seen.append(n) or pool(n))
    run(tmp_path, "--max-steps", 1, "--num-workers", 3)
    assert set(seen) == {3}


def test_ema_is_what_the_checkpoints_hold(plain, tmp_path):
    averaged = run(tmp_path, "--epochs", 2, "--ema", 0.99)
    # training itself is untouched
    assert [r["train_loss"] for r in averaged.epochs] == [r["train_loss"] for r in plain.epochs]
    assert not torch.equal(
        averaged.final_weights["features.0.weight"], plain.final_weights["features.0.weight"]
    )
    assert averaged.epochs[-1]["validation_loss"] != plain.epochs[-1]["validation_loss"]
    model, header = checkpoint.load_model(tmp_path / "checkpoints" / "cnn_small_final.safetensors")
    source = load_source("digits")
    own, rows = select_rows(source, "validation", val_fraction=0.1, seed=42, limit_eval=40)
    images = decode(source, own, rows, image_size=32, num_workers=1)
    scores = scripts.train.evaluate_model(model, images, Preprocessing.from_json(header["preprocessing"]))
    assert scores["loss"] == pytest.approx(averaged.epochs[-1]["validation_loss"], rel=1e-5)


def test_weights_from_a_file(trained, tmp_path):
    flags = ("--max-steps", 1, "--lr", 1e-9, "--weights", trained.final)
    continued = run(tmp_path, *flags)
    before = checkpoint.read_header(trained.final)["metrics"]
    assert continued.epochs[0]["validation_loss"] == pytest.approx(before["loss"], rel=1e-3)
    fresh = run(tmp_path / "none", "--max-steps", 1, "--lr", 1e-9, "--weights", "none")
    assert fresh.epochs[0]["validation_loss"] > 2


def test_image_and_patch_size(tmp_path):
    small = run(tmp_path, "--max-steps", 1, "--image-size", 16)
    assert small.best["preprocessing"]["image_size"] == small.best["model"]["image_size"] == 16
    assert small.best_weights["classifier.1.weight"].shape == (128, 64 * 4 * 4)
    vit = run(tmp_path, "--max-steps", 1, "--model", "vit_scratch", "--patch-size", 8, name="vit_scratch")
    assert vit.best["model"]["patch_size"] == 8
    assert vit.best_weights["positions"].shape == (1, 17, 128)


def test_load_model_rebuilds_the_tuned_vit(tmp_path):
    flags = ("--model", "vit_scratch", "--recipe", "tuned", "--patch-size", 16)
    tuned = run(tmp_path, "--max-steps", 1, *flags, name="vit_scratch")
    assert "positions" in tuned.best_weights and "class_token" not in tuned.best_weights
    model, header = checkpoint.load_model(tmp_path / "checkpoints" / "vit_scratch_best.safetensors")
    assert header["model"]["pre_norm"] and header["model"]["mean_pooling"]
    assert header["arguments"]["augment"] == "crop"
    assert model.class_token is None and model.blocks[0].pre_norm


def test_val_fraction_and_limit_eval(tmp_path):
    out = run(
        tmp_path, "--max-steps", 1, "--val-fraction", 0.25, "--limit-eval", 2000, "--limit-train", 50
    ).out
    assert "50 train, 360 validation, 359 test" in out


def test_best_metric_chooses_the_checkpoint(tmp_path):
    for metric, choose in (("loss", min), ("macro_f1", max)):
        result = run(tmp_path, "--epochs", 5, "--lr", 0.02, "--best-metric", metric, "--limit-train", 64)
        values = [r[f"validation_{metric}"] for r in result.epochs]
        assert result.best["epoch"] == 1 + values.index(choose(values))
        assert result.best["metrics"][metric] == choose(values)
        assert result.final["epoch"] == 5
        assert result.test["best_epoch"] == result.best["epoch"]


def test_early_stop(tmp_path):
    result = run(tmp_path, "--epochs", 50, "--lr", 1e-9, "--early-stop", 2)
    assert [r["epoch"] for r in result.epochs] == [1, 2, 3]
    assert (result.best["epoch"], result.final["epoch"]) == (1, 3)


def test_deterministic_and_num_threads(plain, tmp_path):
    threads = torch.get_num_threads()
    seen = {}
    original = scripts.train.train_step

    def spy(*args, **kwargs):
        seen.update(
            deterministic=torch.are_deterministic_algorithms_enabled(), threads=torch.get_num_threads()
        )
        return original(*args, **kwargs)

    scripts.train.train_step = spy
    try:
        result = run(tmp_path, "--max-steps", 1, "--deterministic", "--num-threads", 1)
        assert seen == {"deterministic": True, "threads": 1}
        assert result.best["arguments"]["num_threads"] == 1
        run(tmp_path, "--max-steps", 1)
        assert seen == {"deterministic": False, "threads": threads}
    finally:
        scripts.train.train_step = original
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compile_trains_the_same_weights(tmp_path):
    flags = ("--max-steps", 2, "--limit-train", 64, "--limit-eval", 10)
    compiled = run(tmp_path / "1", *flags, "--compile")
    eager = run(tmp_path / "2", *flags)
    assert compiled.final_weights.keys() == eager.final_weights.keys()
    for key, value in eager.final_weights.items():
        torch.testing.assert_close(compiled.final_weights[key], value, rtol=1e-3, atol=1e-4)
    assert compiled.best["arguments"]["compile"]


def test_sanity_check_overfits_and_writes_nothing(tmp_path):
    result = call(
        "train",
        *TINY,
        "--sanity-check",
        "--num-batches",
        2,
        "--batch-size",
        8,
        "--output-dir",
        tmp_path / "x",
    )
    assert result.status == 0, result.err
    assert "on 16 images in batches of 8" in result.out
    assert "Sanity check passed" in result.out
    assert not (tmp_path / "x").exists()
    result = call("train", *TINY, "--sanity-check", "--lr", 1e-9, "--max-steps", 5)
    assert result.status == 1
    assert "FAILED" in result.out


@pytest.mark.parametrize(
    "model", ["cnn", "cnn_small", "cnn_fast", "vit_scratch", "vit", "deit", "resnet18", "timm/resnet10t"]
)
def test_each_model_overfits_real_images(model, cifar10):
    flags = [
        "--model",
        model,
        "--dataset",
        cifar10,
        "--image-size",
        32,
        "--weights",
        "none",
        "--sanity-check",
    ]
    result = call("train", *flags, "--num-batches", 5, "--batch-size", 8, "--limit-train", 500)
    assert result.status == 0, result.out + result.err


def test_the_first_layer_of_cnn_fast_comes_from_the_training_images_and_not_from_the_seed(tmp_path):
    def first_layer(name: str, *flags) -> torch.Tensor:
        flags = ("--dataset", "digits", "--image-size", 32, "--limit-eval", 40, "--max-steps", 1, *flags)
        result = call("train", "--model", "cnn_fast", *flags, "--output-dir", tmp_path / name)
        assert result.status == 0, result.err
        path = tmp_path / name / "checkpoints" / "cnn_fast_final.safetensors"
        return safetensors.torch.load_file(path)["whitening.weight"]

    one = first_layer("one", "--limit-train", 200)
    assert not torch.equal(one, first_layer("two", "--limit-train", 100))
    path = tmp_path / "one" / "checkpoints" / "cnn_fast_final.safetensors"
    again = first_layer("three", "--limit-train", 100, "--seed", 1, "--weights", path)
    assert torch.equal(one, again), "given weights are kept"


def test_vit_scratch_learns_at_224_pixels(cifar10):
    """Attending over the batch, as the notebook's did, it stays at ln 10."""
    options = dict(
        model="vit_scratch", dataset=cifar10, image_size=224, limit_train=500, mixed_precision="bf16", lr=5e-4
    )
    result = scripts.train.train_model(
        **options, sanity_check=True, num_batches=8, batch_size=16, max_steps=64
    )
    assert result["loss"] < 0.9 * math.log(10), result


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(tmp_path, monkeypatch):
    original = scripts.train.train_step

    def poisoned(*args, step, **kwargs):
        return original(*args, step=step, **kwargs) * (math.nan if step >= 4 else 1)

    monkeypatch.setattr(scripts.train, "train_step", poisoned)
    result = call("train", *TINY, "--epochs", 3, "--output-dir", tmp_path)
    assert result.status == 1
    assert "the loss was not finite at step 4" in result.err
    assert "Traceback" not in result.err
    header = checkpoint.read_header(tmp_path / "checkpoints" / "cnn_small_best.safetensors")
    assert header["epoch"] == 1
    assert not (tmp_path / "checkpoints" / "cnn_small_final.safetensors").exists()


def test_a_validation_or_test_loss_that_is_not_finite_is_one_line(tmp_path, monkeypatch):
    flags = ("--lr", "1e36", "--limit-train", 32, "--epochs", 1, "--output-dir", tmp_path)
    result = call("train", *TINY, *flags)
    assert_refused(result, "the validation loss was not finite: use a lower --lr", statuses=(1,))

    load_model = checkpoint.load_model

    def broken(path):
        model, header = load_model(path)
        torch.nn.utils.vector_to_parameters(torch.full((545_098,), math.nan), model.parameters())
        return model, header

    monkeypatch.setattr(checkpoint, "load_model", broken)
    result = call("train", *TINY, "--max-steps", 1, "--output-dir", tmp_path)
    assert_refused(result, "the test loss was not finite: use a lower --lr", statuses=(1,))


def test_a_second_run_moves_the_first_aside(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "out")
    second = run(tmp_path / "out", "--max-steps", 1)
    (moved,) = (tmp_path / "out" / "previous").iterdir()
    assert str(moved) in second.out
    for name in ("checkpoints/cnn_small_best.safetensors", "runs/cnn_small/metrics.jsonl"):
        assert (moved / name).read_bytes() == (trained.folder / name).read_bytes()


def test_run_name_names_the_files(tmp_path):
    result = call("train", *TINY, "--max-steps", 1, "--run-name", "my run-1", "--output-dir", tmp_path)
    assert result.status == 0, result.err
    assert (tmp_path / "checkpoints" / "my run-1_best.safetensors").exists()
    assert (tmp_path / "runs" / "my run-1" / "metrics.jsonl").exists()
    assert (
        checkpoint.read_header(tmp_path / "checkpoints" / "my run-1_best.safetensors")["arguments"][
            "run_name"
        ]
        == "my run-1"
    )
    flags = (
        "--model",
        "timm/resnet10t",
        "--weights",
        "none",
        "--image-size",
        32,
        "--max-steps",
        1,
        "--recipe",
        "tuned",
        "--output-dir",
        tmp_path,
    )
    result = call("train", *TINY, *flags)
    assert result.status == 0, result.err
    header = checkpoint.read_header(tmp_path / "checkpoints" / "timm_resnet10t_final.safetensors")
    assert (header["arguments"]["optimizer"], header["arguments"]["lr"]) == ("adamw", 1e-3)
    assert recipes.get_recipe("timm/resnet10t", 32).lr != 1e-3, "the recipe for random weights differs"


def test_reference_on_stl10_is_224_pixels():
    two = torch.arange(2)
    images = Images(torch.zeros(2, 3, 96, 96, dtype=torch.uint8), two, torch.full((2, 2), 96), two, two, [])

    choose = setup.choose_image_size
    assert choose(recipe="tuned", dataset="stl10", images={"train": images}) == 96
    assert choose(recipe="reference", dataset="elsewhere/x", images={"train": images}) == 96
    assert choose(recipe="reference", dataset="stl10", images={"train": images}) == 224


def test_images_of_many_shapes_train_and_a_folder_of_ones_own(tmp_path):
    folder = make_image_folder(tmp_path / "i", {"train": {"a": 12, "b": 12, "c": 12}}, size=(40, 30))
    make_image_folder(tmp_path / "i", {"train": {"a": 6}}, size=(20, 50))
    arguments = (
        "--model",
        "cnn_small",
        "--dataset",
        folder,
        "--image-size",
        24,
        "--augment",
        "light",
        "--batch-size",
        8,
    )
    result = call("train", *arguments, "--epochs", 20, "--output-dir", tmp_path)
    assert result.status == 0, result.err
    header = checkpoint.read_header(tmp_path / "checkpoints" / "cnn_small_best.safetensors")
    assert header["classes"] == ["a", "b", "c"]
    assert header["dataset"]["name"] == str(folder)
    assert header["metrics"]["accuracy"] == 1.0  # each class has a colour of its own
    assert "test accuracy" not in result.out


def test_a_class_without_training_images_is_said(tmp_path):
    folder = make_image_folder(tmp_path / "i", {"train": {"x": 9, "y": 9}, "test": {"x": 2, "new": 2}})
    flags = (
        "--model",
        "cnn_small",
        "--dataset",
        folder,
        "--image-size",
        16,
        "--max-steps",
        1,
        "--output-dir",
        tmp_path,
    )
    result = call("train", *flags)
    assert result.status == 0, result.err
    assert "No training image has the class 'new'." in result.out


def test_the_python_api_is_the_command(tmp_path, plain):
    options = dict(
        model="cnn_small",
        recipe="reference",
        dataset="digits",
        limit_train=96,
        limit_eval=40,
        batch_size=32,
        epochs=2,
        output_dir=tmp_path,
    )
    result = scripts.train.train_model(**options)
    assert result["validation"] == pytest.approx(plain.best["metrics"])
    assert result["test"]["accuracy"] == plain.test["test_accuracy"]
    assert result["best_epoch"] == plain.best["epoch"]
    model, _ = checkpoint.load_model(result["best_checkpoint"])
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="--epochs"):
        scripts.train.train_model(epochs=0)
    with pytest.raises(ValueError, match="unrecognized arguments: --epoch"):
        scripts.train.train_model(epoch=1)
