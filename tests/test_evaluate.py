"""evaluate.py: a checkpoint alone is enough; classes are matched by name; flags override what it says."""

import csv
import shutil

import datasets
import pytest
import torch
from conftest import TINY, assert_refused, call, make_image_folder, scripts
from PIL import Image

from modeling.data.sources import load_source
from modeling.run import checkpoint


def rows(folder):
    with (folder / "traces" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def predictions(folder, name):
    with (folder / "traces" / f"predictions_{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_checkpoint_alone_is_enough(trained, tmp_path):
    moved = shutil.copy(trained.best, tmp_path / "elsewhere.safetensors")
    result = call("evaluate", "--ckpt", moved, "--output-dir", tmp_path)
    assert result.status == 0, result.err
    (row,) = rows(tmp_path)
    assert (row["model"], row["dataset"], row["split"], row["num_samples"]) == (
        "cnn_small",
        "digits",
        "test",
        "359",
    )
    assert (row["parameters"], row["trainable_parameters"]) == ("545098", "545098")
    names = {path.name for path in (tmp_path / "traces").iterdir()}
    assert names == {
        "metrics.csv",
        "model_comparison.txt",
        "confusion_matrix_cnn_small.png",
        "classification_report_cnn_small.txt",
        "predictions_cnn_small.csv",
        "comparison.html",
        "pairs.csv",
        "class_metrics.csv",
        "label_suspects.csv",
    }
    found = predictions(tmp_path, "cnn_small")
    right = sum(line["true"] == line["predicted"] for line in found)
    assert float(row["accuracy"]) == pytest.approx(right / 359)
    assert f"accuracy {float(row['accuracy']):.4f}" in result.out
    with Image.open(tmp_path / "traces" / "confusion_matrix_cnn_small.png") as picture:
        picture.verify()


def test_validation_is_the_split_that_training_saw(trained, tmp_path):
    result = call(
        "evaluate",
        "--ckpt",
        trained.best,
        "--split",
        "validation",
        "--limit-eval",
        40,
        "--output-dir",
        tmp_path,
    )
    assert result.status == 0, result.err
    (row,) = rows(tmp_path)
    header = checkpoint.read_header(trained.best)
    for name in ("loss", "accuracy", "macro_f1"):
        assert float(row[name]) == pytest.approx(header["metrics"][name], rel=1e-6)
    assert row["num_samples"] == "40"


def test_two_checkpoints_of_a_run_get_their_stems_and_a_comparison(trained, tmp_path):
    result = call(
        "evaluate", "--ckpt", trained.best, trained.final, "--batch-size", 7, "--output-dir", tmp_path
    )
    assert result.status == 0, result.err
    assert [row["checkpoint"] for row in rows(tmp_path)] == [str(trained.best), str(trained.final)]
    assert (tmp_path / "traces" / "confusion_matrix_cnn_small_final.png").exists()
    comparison = (tmp_path / "traces" / "model_comparison.txt").read_text()
    assert "Differences from cnn_small_" in comparison
    assert "cnn_small_best" in comparison
    again = call("evaluate", "--ckpt", trained.best, trained.final, "--output-dir", tmp_path)
    assert again.status == 0
    assert len(rows(tmp_path)) == 2


def digits_folder(path, order, split="test"):
    """digits' test images as parquet, its classes in another order."""
    source = load_source("digits").splits["test"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=order)})
    names = [str(label) for label in source.labels.tolist()]
    keep = [i for i, name in enumerate(names) if name in order]
    columns = {"image": source.cells(keep), "label": [order.index(names[i]) for i in keep]}
    path.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path / f"{split}.parquet")
    return path


def test_classes_are_matched_by_name(trained, tmp_path):
    assert call("evaluate", "--ckpt", trained.best, "--output-dir", tmp_path / "plain").status == 0
    shuffled = digits_folder(tmp_path / "shuffled", list("7319460285"))
    result = call("evaluate", "--ckpt", trained.best, "--dataset", shuffled, "--output-dir", tmp_path / "s")
    assert result.status == 0, result.err
    assert "matched by name" in result.out
    assert rows(tmp_path / "s")[0]["accuracy"] == rows(tmp_path / "plain")[0]["accuracy"]
    # Another dataset is in the names of the files.
    shuffled_predictions = predictions(tmp_path / "s", "cnn_small_test_shuffled")
    assert shuffled_predictions == predictions(tmp_path / "plain", "cnn_small")


def test_a_dataset_with_fewer_classes_and_only_a_test_split(trained, tmp_path):
    few = digits_folder(tmp_path / "few", ["3", "1"])
    result = call("evaluate", "--ckpt", trained.best, "--dataset", few, "--output-dir", tmp_path)
    assert result.status == 0, result.err
    assert "the dataset lacks '0', '2', '4'" in result.out
    assert {line["true"] for line in predictions(tmp_path, "cnn_small_test_few")} == {"1", "3"}


def test_bad_input(trained, tmp_path, monkeypatch):
    out = ("--output-dir", tmp_path / "out")
    folder = make_image_folder(tmp_path / "pets", {"test": {"cat": 3, "dog": 3}})
    assert_refused(
        call("evaluate", "--ckpt", trained.best, "--dataset", folder, *out), "'cat', 'dog'", "'0', '1'"
    )
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(trained.best.read_bytes()[:1000])
    assert_refused(
        call("evaluate", "--ckpt", trained.best, cut, *out), "cut.safetensors", "not a whole safetensors file"
    )
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pth")
    assert_refused(call("evaluate", "--ckpt", tmp_path / "model.pth", *out), "model.pth", "pickled")
    assert_refused(call("evaluate", "--ckpt", tmp_path / "absent", *out), "absent")
    assert_refused(call("evaluate", "--ckpt", trained.best, "--split", "training", *out), "--split")
    assert_refused(call("evaluate", *out), "--ckpt")
    assert_refused(call("evaluate", "--ckpt", trained.best, trained.best, *out), "same checkpoint twice")
    assert not (tmp_path / "out" / "traces").exists()


def test_two_checkpoints_are_ranked_paired_and_shown_on_a_page(trained, tmp_path):
    flags = ("--max-steps", 1, "--run-name", "worse", "--output-dir", tmp_path)
    worse = call("train", *TINY, *flags)
    assert worse.status == 0, worse.err
    other = tmp_path / "checkpoints" / "worse_best.safetensors"
    result = call("evaluate", "--ckpt", trained.best, other, "--output-dir", tmp_path)
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    ranking = next(number for number, line in enumerate(lines) if line.startswith("rank  model"))
    assert lines[ranking + 1].startswith("1     cnn_small") and lines[ranking + 2].startswith("2     worse")
    assert "cnn_small over worse: +" in result.out and ": real" in result.out
    assert "one run of each: another seed changes the accuracy too" in result.out
    assert "comparison.html" in result.out
    (pair,) = csv.DictReader((tmp_path / "traces" / "pairs.csv").open())
    rows = {row["model"]: row for row in csv.DictReader((tmp_path / "traces" / "class_metrics.csv").open())}
    assert set(rows) == {"cnn_small", "worse"}
    scores = {row["checkpoint"]: row for row in csv.DictReader((tmp_path / "traces" / "metrics.csv").open())}
    difference = float(scores[str(trained.best)]["accuracy"]) - float(scores[str(other)]["accuracy"])
    assert float(pair["difference"]) == pytest.approx(difference, abs=1e-5)


def test_checkpoints_of_one_preprocessing_decode_their_images_once(trained, tmp_path, monkeypatch):
    decoded = []
    original = scripts.evaluate.decode

    def counted(*args, **kwargs):
        decoded.append(args[1])
        return original(*args, **kwargs)

    monkeypatch.setattr(scripts.evaluate, "decode", counted)
    assert call("evaluate", "--ckpt", trained.best, trained.final, "--output-dir", tmp_path).status == 0
    assert decoded == ["test"]


def test_logits_that_are_not_finite_are_refused_by_the_name_of_the_checkpoint(trained, tmp_path, monkeypatch):
    original = scripts.evaluate.predict

    def poisoned(*args, **kwargs):
        predictions = original(*args, **kwargs)
        predictions.logits[3, 2] = float("nan")
        return predictions

    monkeypatch.setattr(scripts.evaluate, "predict", poisoned)
    result = call("evaluate", "--ckpt", trained.best, "--output-dir", tmp_path)
    assert_refused(result, str(trained.best), "NaN or infinite logits")


def train_on(folder, out, *flags):
    options = ("--image-size", 16, "--batch-size", 16, "--max-steps", 2, "--num-workers", 1)
    result = call("train", "--model", "cnn_small", "--dataset", folder, "--output-dir", out, *options, *flags)
    assert result.status == 0, result.err
    return out / "checkpoints" / "cnn_small_best.safetensors"


def test_each_evaluation_has_files_of_its_own_that_lead_to_the_pictures(tmp_path):
    counts = {
        "train": {"hat": 12, "shoes": 12},
        "test": {"hat": 3, "shoes": 2},
        "val": {"hat": 2, "shoes": 2},
    }
    data = make_image_folder(tmp_path / "data", counts)
    best = train_on(data, tmp_path / "out")
    traces = tmp_path / "out" / "traces"
    assert call("evaluate", "--ckpt", best, "--output-dir", tmp_path / "out").status == 0
    of_test = (traces / "predictions_cnn_small.csv").read_bytes()
    flags = ("--split", "validation", "--output-dir", tmp_path / "out")
    assert call("evaluate", "--ckpt", best, *flags).status == 0
    assert (traces / "predictions_cnn_small.csv").read_bytes() == of_test
    # The comparison of the first command is kept.
    (older,) = (traces / "previous").iterdir()
    assert {"comparison.html", "class_metrics.csv", "model_comparison.txt"} <= {
        p.name for p in older.iterdir()
    }
    assert "test of" in (older / "model_comparison.txt").read_text()
    files = [row["file"] for row in predictions(tmp_path / "out", "cnn_small_validation")]
    assert files == ["val/hat/0.png", "val/hat/1.png", "val/shoes/0.png", "val/shoes/1.png"]
    # Two runs of one name are told apart by their folders.
    other = train_on(data, tmp_path / "seed2", "--seed", 2)
    result = call("evaluate", "--ckpt", best, other, "--output-dir", tmp_path / "both")
    assert result.status == 0, result.err
    assert predictions(tmp_path / "both", "out_cnn_small_best")
    assert predictions(tmp_path / "both", "seed2_cnn_small_best")


def test_the_checkpoints_own_dataset_is_read_as_in_training_whatever_its_path_is_called(
    tmp_path, monkeypatch
):
    make_image_folder(tmp_path / "data", {"im": {"x": 24}})
    lines = [f"im/x/{i}.png,{i % 2},{i // 12}" for i in range(24)]
    (tmp_path / "data" / "t.csv").write_text("\n".join(["file_name,label,quality", *lines]))
    monkeypatch.chdir(tmp_path)
    best = train_on("data/t.csv", tmp_path, "--label-column", "quality")
    for flags in ((), ("--dataset", "data/t.csv"), ("--image-column", "file_name")):
        result = call("evaluate", "--ckpt", best, *flags, "--output-dir", tmp_path)
        assert result.status == 0 and "(column quality of t.csv" in result.out
    other = ("--label-column", "label", "--force")
    result = call("evaluate", "--ckpt", best, *other, "--output-dir", tmp_path)
    assert "(column label of t.csv" in result.out
    assert "is not read as in training (label_column label)" in result.out
    assert {row["dataset"].rpartition(" (")[2] for row in rows(tmp_path)} >= {"label_column label)"}


def test_another_folder_as_test_gives_other_images_and_other_files(tmp_path):
    data = make_image_folder(tmp_path / "data", {"train": {"a": 20, "b": 20}, "old": {"a": 9, "b": 9}})
    make_image_folder(data, {"new": {"a": 9, "b": 9}})
    flags = ("--train-split", "train", "--test-split")
    one = train_on(data, tmp_path / "1", *flags, "old")
    two = train_on(data, tmp_path / "2", *flags, "new", "--seed", 7, "--run-name", "two").with_name(
        "two_best.safetensors"
    )
    result = call("evaluate", "--ckpt", one, two, "--output-dir", tmp_path)
    assert result.status == 0 and "their images or classes differ" in result.out
    assert "different images" in (tmp_path / "traces/model_comparison.txt").read_text()
    assert call("evaluate", "--ckpt", one, "--test-split", "new", "--output-dir", tmp_path).status == 0
    assert len(rows(tmp_path)) == 3
    assert predictions(tmp_path, "cnn_small") and predictions(tmp_path, "cnn_small_test_split_new")


def test_test_images_that_were_training_images_are_said(tmp_path):
    data = make_image_folder(tmp_path / "data", {"train": {"a": 20, "b": 20}, "test": {"a": 2, "b": 2}})
    best = train_on(data, tmp_path)
    (data / "train/a/3.png").rename(data / "test/a/moved.png")
    result = call("evaluate", "--ckpt", best, "--output-dir", tmp_path)
    assert result.status == 0
    assert "has 39 images and had 40. Its test images may have been trained on.\n" in result.out


def test_only_the_images_of_training_are_divided(tmp_path):
    data = make_image_folder(tmp_path / "data", {"train": {"hat": 20, "shoes": 20}})
    best = train_on(data, tmp_path / "out")
    out = ("--output-dir", tmp_path / "out")
    result = call("evaluate", "--ckpt", best, *out)
    assert "validation of" in result.out and " 4 images" in result.out
    # The same images elsewhere are the same images.
    moved = data.rename(tmp_path / "moved")
    result = call("evaluate", "--ckpt", best, "--dataset", moved, *out)
    assert "validation of" in result.out and " 4 images" in result.out
    # Other images are evaluated whole, and one class is enough.
    other = make_image_folder(tmp_path / "new", {".": {"hat": 7}})
    result = call("evaluate", "--ckpt", best, "--dataset", other, *out)
    assert "train of" in result.out and " 7 images" in result.out
    # Images that were added would be divided in another way.
    moved.rename(data)
    make_image_folder(data, {"train": {"hat": 25}})
    result = call("evaluate", "--ckpt", best, "--split", "validation", *out)
    assert_refused(result, "its train split has 45 images and had 40", "--force")
    result = call("evaluate", "--ckpt", best, "--split", "validation", "--force", *out)
    assert result.status == 0, result.err


def test_the_header_says_what_was_read(trained):
    read = checkpoint.read_header(trained.best)["dataset"]["read"]
    assert read["classes_from"] == "scikit-learn"
    assert read["splits"] == {"train": 1438, "test": 359}
