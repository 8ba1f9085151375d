"""Exports: the pixels are the source's, the tree is finished after a stop, --verify finds what differs."""

import hashlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_refused, call, make_image_folder, scripts
from PIL import Image

from modeling.data.class_names import encode_class
from modeling.data.division import select_rows
from modeling.data.images import decode
from modeling.data.sources import load_source
from modeling.run.lock import Lock

export_data = scripts.export_data


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    counts = {
        "train": {"cat's": 20, "Ünïcode dog": 15, "a,b $x$": 15},
        "test": {"cat's": 4, "Ünïcode dog": 3, "a,b $x$": 3},
    }
    return make_image_folder(tmp_path_factory.mktemp("source"), counts)


@pytest.fixture
def exported(source_folder, tmp_path):
    folder = tmp_path / "data"
    result = call("export_data", "--dataset", source_folder, "--output-dir", folder, "--val-fraction", 0.2)
    assert result.status == 0, result.err
    assert "40 in train/, 10 in val/, 10 in test/" in result.out
    return folder


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_image_is_there_once_with_its_own_pixels(source_folder, exported):
    source = load_source(str(source_folder))
    options = dict(val_fraction=0.2, seed=42)
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        own, rows = select_rows(source, split, **options)
        labels = source.labels(own)[rows].tolist()
        files = {path.relative_to(exported / name).as_posix() for path in (exported / name).rglob("*.png")}
        assert files == {
            f"{source.classes[label]}/{row:06d}.png" for row, label in zip(rows.tolist(), labels, strict=True)
        }
        for row, label in zip(rows.tolist(), labels, strict=True):
            ours = np.asarray(Image.open(exported / name / source.classes[label] / f"{row:06d}.png"))
            cell = source.splits[own].cells([row])[0]
            assert np.array_equal(ours, np.asarray(Image.open(cell["path"])))


def test_the_manifest_counts_and_hashes(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["counts"]["train"] == {"Ünïcode dog": 12, "a,b $x$": 12, "cat's": 16}
    assert sum(sum(c.values()) for c in manifest["counts"].values()) == len(manifest["files"]) == 60
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest


def test_a_stopped_export_is_finished_to_the_same_tree(source_folder, exported, tmp_path, monkeypatch):
    other = tmp_path / "other"
    written = []

    def stop_halfway(path, content):
        if len(written) == 25:
            raise KeyboardInterrupt
        written.append(path)
        return original(path, content)

    original = export_data._write_if_different
    monkeypatch.setattr(export_data, "_write_if_different", stop_halfway)
    arguments = ("--dataset", source_folder, "--output-dir", other, "--val-fraction", 0.2)
    assert call("export_data", *arguments).status == 130
    monkeypatch.undo()
    assert_refused(call("export_data", "--verify", "--output-dir", other), "was not finished")
    written[3].write_bytes(b"half a file")
    assert call("export_data", *arguments).status == 0
    assert tree(other) == tree(exported)
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*.png")}
    assert call("export_data", *arguments).status == 0  # a third time rewrites no image
    assert before == {path: path.stat().st_mtime_ns for path in other.rglob("*.png")}


def test_verify_reads_only_and_names_what_differs(exported):
    verify = ("--verify", "--output-dir", exported)
    before = tree(exported)
    result = call("export_data", *verify)
    assert (result.status, "is complete" in result.out) == (0, True)
    assert tree(exported) == before
    missing, altered, broken = list((exported / "train" / "cat's").iterdir())[:3]
    missing.unlink()
    Image.fromarray(255 - np.asarray(Image.open(altered))).save(altered)
    broken.write_bytes(broken.read_bytes()[:40])
    shutil.copy(altered, exported / "val" / "extra.png")
    (exported / "stray.txt").write_text("?")
    result = call("export_data", *verify)
    assert result.status == 1
    assert sorted(result.out.splitlines()) == sorted(
        [
            f"missing train/cat's/{missing.name}",
            f"altered train/cat's/{altered.name}",
            f"undecodable train/cat's/{broken.name}",
            "extra val/extra.png",
            "extra stray.txt",
        ]
    )


def test_training_sees_the_same_classes_and_images(exported, source_folder):
    source = load_source(str(exported))
    assert source.classes == load_source(str(source_folder)).classes
    assert {split: len(rows) for split, rows in source.splits.items()} == {
        "train": 40,
        "validation": 10,
        "test": 10,
    }


def test_a_dataset_without_test_has_no_test_folder(tmp_path):
    source = make_image_folder(tmp_path / "s", {"train": {"a": 10, "b": 10}})
    manifest = export_data.export_to_imagefolder(str(source), tmp_path / "out")
    assert set(manifest["counts"]) == {"train", "val"}
    assert not (tmp_path / "out" / "test").exists()
    assert sum(manifest["counts"]["val"].values()) == 2
    assert export_data.verify_dataset(tmp_path / "out") == []


def test_a_folder_that_holds_something_else_is_left_alone(exported, source_folder, tmp_path):
    before = tree(exported)
    other_seed = ("--dataset", source_folder, "--output-dir", exported, "--val-fraction", 0.2, "--seed", 7)
    assert_refused(call("export_data", *other_seed), "seed 42, not 7")
    assert tree(exported) == before
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    assert_refused(
        call("export_data", "--dataset", source_folder, "--output-dir", precious), "holds no export"
    )
    assert tree(precious) == {"thesis.txt": b"x"}
    assert_refused(call("export_data", "--verify", "--output-dir", precious), "holds no export")
    assert_refused(
        call("export_data", "--dataset", source_folder, "--output-dir", precious / "thesis.txt"), "thesis.txt"
    )
    assert_refused(call("export_data", "--val-fraction", "1.5"), "--val-fraction")
    for flags in (("--dataset", "digits"), ("--val-fraction", 0.3), ("--test-split", "x")):
        refused = call("export_data", "--verify", "--output-dir", exported, *flags)
        assert_refused(refused, "--verify reads only the files")


def test_an_export_of_other_splits_is_another_export(tmp_path):
    data = make_image_folder(tmp_path / "in", {name: {"x": 4, "y": 4} for name in ("train", "old", "new")})
    flags = ("--dataset", data, "--output-dir", tmp_path / "out", "--train-split", "train", "--test-split")
    assert call("export_data", *flags, "old").status == 0
    assert_refused(call("export_data", *flags, "new"), "holds an export with choices", "choose another")


def test_what_a_killed_export_leaves_of_its_own_is_no_obstacle(exported, source_folder, monkeypatch):
    monkeypatch.setattr("modeling.run.lock.WATCH_SECONDS", 0.2)
    arguments = ("--dataset", source_folder, "--output-dir", exported, "--val-fraction", 0.2)
    before = tree(exported)
    for name in (".manifest.json.0a1b2c3d.tmp", "val/cat's/.000001.png.part", ".export.lock"):
        (exported / name).write_text("{")
        result = call("export_data", "--verify", "--output-dir", exported)
        assert result.status == 0, result.out
    assert call("export_data", *arguments).status == 0
    assert tree(exported) == before
    shutil.rmtree(exported)
    exported.mkdir()
    (exported / ".manifest.json.0a1b2c3d.tmp").write_text("{")  # killed in its first write
    assert call("export_data", *arguments).status == 0
    assert tree(exported) == before


def test_two_exports_into_one_folder_do_not_meet(exported, source_folder):
    lock = exported / ".export.lock"
    with Lock([lock], description="the export", advice="wait"):
        result = call(
            "export_data", "--dataset", source_folder, "--output-dir", exported, "--val-fraction", 0.2
        )
    assert_refused(result, f"the export to {exported} is in use by process")
    assert not lock.exists()


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"complete": true}', '{"complete": true, "files": [1]}', "[" * 100_000, "\xff"]
)
def test_a_manifest_of_any_content_is_refused(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    for flags in (("--verify",), ("--dataset", "digits")):
        assert_refused(call("export_data", *flags, "--output-dir", tmp_path), str(tmp_path))


def test_a_failed_second_export_leaves_the_first_and_its_manifest(tmp_path):
    source = make_image_folder(tmp_path / "s", {"train": {"a": 10, "b": 10}})
    arguments = ("--dataset", source, "--output-dir", tmp_path / "out")
    assert_refused(call("export_data", *arguments, "--val-fraction", 0.001), "is empty")
    assert not (tmp_path / "out").exists()
    assert call("export_data", *arguments).status == 0
    before = tree(tmp_path / "out")
    (source / "train" / "a" / "3.png").write_bytes(b"broken")
    assert_refused(call("export_data", *arguments), "3.png")
    assert tree(tmp_path / "out") == before
    (source / "train" / "a" / "3.png").unlink()
    assert_refused(call("export_data", *arguments), "that this export did not write")


def test_names_that_a_path_cannot_hold_are_encoded():
    assert [encode_class(name) for name in ("a/b", "..", ".", "x\\y", "50%", "plain")] == [
        "a%2Fb",
        "%2E.",
        "%2E",
        "x%5Cy",
        "50%25",
        "plain",
    ]
    assert encode_class("") == "%"  # "%" itself is %25


def test_odd_folders_can_be_trained_on(tmp_path):
    import datasets

    names = ["a/b", "..", "[x]*", "_y", "train", "50%"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    pixels = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(6)]
    rows = {
        "image": [Image.fromarray(p) for p in pixels for _ in range(10)],
        "label": [i for i in range(6) for _ in range(10)],
    }
    (tmp_path / "p").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "p" / "train.parquet")
    manifest = export_data.export_to_imagefolder(str(tmp_path / "p"), tmp_path / "out")
    assert manifest["classes"]["a/b"] == "a%2Fb"
    source = load_source(str(tmp_path / "out"))
    assert sorted(source.classes) == sorted(names)
    for split, count in (("train", 54), ("validation", 6)):
        images = decode(source, split, torch.arange(len(source.splits[split])), image_size=8, num_workers=1)
        assert len(images) == count
        for image, label in zip(images.pixels, images.labels.tolist(), strict=True):
            assert names[int(image[0, 0, 0]) // 40] == source.classes[label]


def test_real_images_keep_their_pixels(stl10_sample, tmp_path):
    manifest = export_data.export_to_imagefolder(str(stl10_sample), tmp_path / "out", num_workers=2)
    source = load_source(str(stl10_sample))
    for name in manifest["files"]:
        row = int(name.rsplit("/", 1)[1].removesuffix(".png"))
        cell = source.splits["train"].cells([row])[0]
        original = Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / name)), np.asarray(original))
        assert name.split("/")[1] == source.classes[source.labels("train")[row]]
