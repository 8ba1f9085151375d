"""What was read is what was meant: folders, tables and parquet files as people have them."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import call, make_image_folder
from PIL import Image, features

from modeling.data.choices import Choices
from modeling.data.class_names import decode_class, encode_class
from modeling.data.folders import SPLITS
from modeling.data.sources import load_source
from modeling.errors import UserError
from modeling.files import read_tensors

TWO = {"hat": 3, "shoes": 2}


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 2 * value % 256, 9)).save(path)
    return path


def read(folder: Path, **choices: str) -> tuple[list[str], dict[str, int]]:
    source = load_source(str(folder), Choices(**choices))
    return source.classes, {split: len(source.splits[split]) for split in SPLITS if split in source.splits}


# ---- A. Splits, wherever they stand --------------------------------------------------------------


@pytest.mark.parametrize(
    "train, test",
    [
        ("train", "test"),
        ("clothes/train", "clothes/test"),
        ("a/b/Training", "a/b/EVAL"),
        ("training_set", "test_set"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train-images", "evaluation images"),
    ],
)
def test_splits_are_found_under_a_wrapper_and_under_the_usual_names(tmp_path, train, test):
    make_image_folder(tmp_path, {train: TWO, test: {"hat": 1, "shoes": 1}})
    assert read(tmp_path) == (["hat", "shoes"], {"train": 5, "test": 2})


@pytest.mark.parametrize("name", ["val", "valid", "dev", "validation"])
def test_every_name_of_validation_is_validation(tmp_path, name):
    make_image_folder(tmp_path, {"train": TWO, name: {"hat": 1}})
    assert read(tmp_path) == (["hat", "shoes"], {"train": 5, "validation": 1})


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"x/train": TWO, "x/test": TWO, "y/train": TWO, "y/test": TWO}, "x/test/ stands inside x/"),
        ({".": {"hat": 2, "shoes": 2}, "hat/test": {".": 1}}, "hat/test/ stands inside hat/"),
        ({"test": TWO, "eval": TWO}, "eval and test are both the test split"),
        ({"train station": TWO, "airport": {"x": 2}}, "may be a split"),
        ({".": {"train": 2, "test": 2}}, "holds 4 images but no class folders"),
    ],
)
def test_a_tree_that_can_be_read_in_two_ways_is_refused(tmp_path, tree, words):
    make_image_folder(tmp_path, tree)
    with pytest.raises(UserError, match=words):
        load_source(str(tmp_path))


def test_the_user_chooses_the_folders_of_splits(tmp_path):
    make_image_folder(tmp_path, {"2023": TWO, "2024": {"hat": 1, "shoes": 1}, "test": {"hat": 4}})
    chosen = read(tmp_path, train_split="2023", test_split="2024")
    assert chosen == (["hat", "shoes"], {"train": 5, "test": 2})
    with pytest.raises(UserError, match="no folder '2025' with images, only 2023, 2024, test"):
        read(tmp_path, train_split="2025")


@pytest.mark.parametrize(
    "dataset, choices, kind",
    [
        ("digits", {"train_split": "a"}, "digits"),
        ("folders", {"label_column": "a"}, "class folders"),
        ("folders", {"dataset_config": "a"}, "class folders"),
        ("folders/labels.csv", {"test_split": "b"}, "a table of labels"),
        ("folders/labels.csv", {"dataset_config": "a"}, "a table of labels"),
    ],
)
def test_a_choice_that_means_nothing_for_a_dataset_is_refused(tmp_path, dataset, choices, kind, monkeypatch):
    make_image_folder(tmp_path / "folders", {"train": TWO})
    (tmp_path / "folders/labels.csv").write_text("file_name,label\ntrain/hat/0.png,x\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=f"--{next(iter(choices)).replace('_', '-')} . does not apply to {kind}"
    ):
        load_source(dataset, Choices(**choices))


# ---- E, F, L. Which files are images, which folder is the class -----------------------------------


def test_the_class_is_the_first_folder_below_the_split_and_every_raster_format_is_read(tmp_path):
    for i, name in enumerate(
        ["hat/monday/1.JPG", "hat/2.webp", "shoes/a/b/3.Png", "shoes/4.tiff", "shoes/5.bmp"]
    ):
        save(tmp_path / "train" / name, i)
    if features.check("avif"):
        save(tmp_path / "train" / "dress" / "6.avif")
    classes, counts = read(tmp_path)
    assert classes == (["dress"] if features.check("avif") else []) + ["hat", "shoes"]
    assert counts == {"train": 5 + features.check("avif")}


def test_what_is_left_out_is_counted_and_litter_never_decides(tmp_path):
    make_image_folder(tmp_path, {"train": TWO, "test": {"hat": 1, "shoes": 1}})
    for place in (tmp_path, tmp_path / "train", tmp_path / "train" / "hat"):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._1.jpg"):
            (place / name).write_bytes(b"x")
        for folder in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"):
            save(place / folder / "hat" / "copy.jpg")
    hat = tmp_path / "train" / "hat"
    for name in ("1.jpg.json", "1.jpg.xmp", "notes", "IMG_1.HEIC", "IMG_2.heic", "old.zip"):
        (hat / name).write_bytes(b"x")
    (hat / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (hat / "loop").symlink_to(tmp_path / "train")
    os.mkfifo(hat / "pipe.jpg")
    save(tmp_path / "train" / "overview.jpg")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "metadata.csv").write_text("record,age\nr1,20\n")
    # Files of other programs at the top: counted, and no reason to refuse the class folders.
    (tmp_path / "notes.csv").write_bytes("größe,art\n".encode("latin-1"))
    pq.write_table(pa.table({"feature": [0.5]}), tmp_path / "features.parquet")
    (tmp_path / "train.zip").write_bytes(b"x")
    source = load_source(str(tmp_path))
    assert source.classes == ["hat", "shoes"]
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 5, "test": 2}
    left_out = source.describe().partition("left out: ")[2]
    for said in (
        "2 .heic",
        "1 .json",
        "1 .xmp",
        "2 .zip",
        "2 .csv",
        "1 .parquet",
        "1 without extension",
        "1 broken links",
        "1 links to a folder above",
        "1 special files",
        "1 empty folders",
        "1 images outside class folders",
    ):
        assert said in left_out, left_out
    assert source.describe().startswith(
        "classes 2: hat, shoes (folders); splits: 5 train, 2 test; left out: "
    )
    assert source.to_json()["left_out"][".heic"] == 2


def test_links_are_followed(tmp_path):
    make_image_folder(tmp_path / "elsewhere", {"x": {"dress": 2}})
    make_image_folder(tmp_path / "data", {"train": TWO})
    (tmp_path / "data" / "train" / "dress").symlink_to(tmp_path / "elsewhere" / "x" / "dress")
    image = next((tmp_path / "elsewhere" / "x" / "dress").iterdir())
    (tmp_path / "data" / "train" / "hat" / "linked.png").symlink_to(image)
    assert read(tmp_path / "data") == (["dress", "hat", "shoes"], {"train": 8})


def test_a_class_folder_without_a_usable_image_is_named(tmp_path):
    make_image_folder(tmp_path, {"train": TWO})
    (tmp_path / "train" / "pants").mkdir()
    for i in range(3):
        (tmp_path / "train" / "pants" / f"{i}").write_bytes(b"x")
    with pytest.raises(
        UserError, match="train/pants/ holds no image that can be read, only 3 without extension"
    ):
        load_source(str(tmp_path))


def test_what_our_own_scripts_write_is_no_class(tmp_path):
    make_image_folder(tmp_path, {".": TWO, "traces": {".": 1}, "checkpoints": {".": 1}, "runs/r": {".": 1}})
    (tmp_path / "traces" / "metrics.csv").write_text("x")
    (tmp_path / "checkpoints" / "r_best.safetensors").write_bytes(b"x")
    (tmp_path / "runs" / "r" / "metrics.jsonl").write_text("{}")
    assert read(tmp_path) == (["hat", "shoes"], {"train": 5})


@pytest.mark.parametrize("name", ["a/b", "..", "", "_x", "50%", "Hat: top?", "%41", "Übergröße", "train"])
def test_class_names_survive_an_export(name):
    folder = encode_class(name)
    assert folder and "/" not in folder and not folder.startswith((".", "_"))
    assert decode_class(folder) == name


def test_names_are_names_not_patterns(tmp_path):
    folder = tmp_path / "set [1]::x?*"
    make_image_folder(folder, {"train": {"[a]": 2, "b*": 1, "U\u0308ber": 1}, "test": {"\xdcber": 1}})
    assert read(folder) == (["[a]", "b*", "\xdcber"], {"train": 4, "test": 1})
    latin1 = os.fsencode(tmp_path / "l" / "train") + b"/caf\xe9"
    make_image_folder(tmp_path / "l", {"train": TWO})
    os.rename(tmp_path / "l" / "train" / "hat", latin1)
    with pytest.raises(UserError, match="not UTF-8"):
        load_source(str(tmp_path / "l"))


# ---- G. Classes of all splits together -----------------------------------------------------------


def test_a_split_may_lack_classes_and_one_class_is_enough_to_read(tmp_path):
    make_image_folder(tmp_path / "a", {"train": TWO, "test": {"hat": 2}})
    assert read(tmp_path / "a") == (["hat", "shoes"], {"train": 5, "test": 2})
    make_image_folder(tmp_path / "b", {"train": TWO, "test": {"unknown": 4}})
    source = load_source(str(tmp_path / "b"))
    assert source.classes == ["hat", "shoes"]
    assert "left out: 4 images of test (without a class of train: 4 unknown)" in source.describe()
    make_image_folder(tmp_path / "c", {".": {"hat": 2}})
    assert read(tmp_path / "c") == (["hat"], {"train": 2})


# ---- Tables --------------------------------------------------------------------------------------


def write_table(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl"])
def test_a_table_gives_labels_to_images_anywhere_below_its_folder(tmp_path, kind):
    for i in range(4):
        save(tmp_path / "pictures" / f"{i}" / f"{i}, x.png", i)
    rows = [{"path": f"pictures/{i}/{i}, x.png", "target": [10, 9, 9, 100][i], "age": i} for i in range(4)]
    table = write_table(tmp_path / f"labels{kind}", rows)
    for given in (table, tmp_path):
        source = load_source(str(given))
        assert source.classes == ["9", "10", "100"]  # numbers in numerical order
        assert source.labels("train").tolist() == [1, 0, 0, 2]
        assert source.columns == ("path", "target")
        assert f"column target of labels{kind}" in source.describe()


def test_a_table_divides_by_its_split_column_or_its_name_or_its_folder(tmp_path):
    for i in range(3):
        save(tmp_path / "a" / f"{i}.png")
        save(tmp_path / "b" / ("train" if i else "test") / f"{i}.png")
    rows = [
        {"file_name": f"{i}.png", "label": f"c{i % 2}", "split": ["train", "val", "test"][i]}
        for i in range(3)
    ]
    write_table(tmp_path / "a" / "labels.csv", rows)
    assert read(tmp_path / "a") == (["c0", "c1"], {"train": 1, "validation": 1, "test": 1})
    for split, numbers in (("train", (1, 2)), ("test", (0,))):
        rows = [{"file_name": f"{i}.png", "label": f"c{i}"} for i in numbers]
        write_table(tmp_path / "b" / split / "metadata.csv", rows)
    assert read(tmp_path / "b") == (["c0", "c1", "c2"], {"train": 2, "test": 1})


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"file_name": "../x.png", "label": 1}], "row 1 of t.csv names ../x.png, which is outside"),
        ([{"file_name": "/etc/x.png", "label": 1}], "outside the folder"),
        (
            [{"file_name": "0.png", "label": 1}, {"file_name": "no.png", "label": 1}],
            "row 2 .* there is no file",
        ),
        (
            [{"file_name": "0.png", "label": 1}, {"file_name": "./0.png", "label": 2}],
            "row 2 .*row 1 .* already",
        ),
        ([{"file_name": "0.png", "label": ""}], "row 1 of t.csv has no label"),
        ([{"file_name": "0.png", "label": 1, "class": 2}], "columns label and class: choose one"),
        (
            [{"file": "0.png", "label": 1}],
            "none of the columns file_name, path, image, filename, only file, label",
        ),
        ([{"file_name": "t.csv", "label": 1}], "no image that can be read"),
    ],
)
def test_a_table_that_is_not_meant_so_is_refused_by_row_or_column(tmp_path, rows, words):
    save(tmp_path / "0.png")
    with pytest.raises(UserError, match=words):
        load_source(str(write_table(tmp_path / "t.csv", rows)))


def test_a_table_of_the_same_pictures_is_the_same_dataset(tmp_path):
    make_image_folder(tmp_path, {"train": TWO, "test": {"hat": 2}})
    paths = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    rows = [{"file_name": str(p), "label": p.parts[1], "split": p.parts[0]} for p in reversed(paths)]
    source = load_source(str(write_table(tmp_path / "labels.csv", rows)))
    folder = load_source(str(tmp_path))
    assert source.classes == folder.classes
    for split in folder.splits:
        assert source.labels(split).tolist() == folder.labels(split).tolist()
        assert source.splits[split].files == folder.splits[split].files
        assert source.splits[split].identity == folder.splits[split].identity


# ---- B, J, M. Parquet ----------------------------------------------------------------------------


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 7, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, labels, names=None, column="label", image="struct") -> None:
    """Write images whose red channel is their number, with labels of any type, and names if there are any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(i), "path": f"{i}.png"} for i in range(len(labels))]
    images = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    if image == "binary":
        images = pa.array([cell["bytes"] for cell in cells])
    table = pa.table({"image": images, column: pa.array(labels)})
    if names is not None:
        info = {"features": {"image": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": info})})
    pq.write_table(table, path)


def test_class_names_are_matched_file_by_file_or_refused(tmp_path):
    write_parquet(tmp_path / "a" / "train.parquet", [0, 1, 2], ["cat", "dog", "eel"])
    write_parquet(tmp_path / "a" / "test.parquet", [0, 1, 2], ["eel", "cat", "dog"])
    source = load_source(str(tmp_path / "a"))
    assert source.classes == ["cat", "dog", "eel"]
    assert source.labels("test").tolist() == [2, 0, 1]
    write_parquet(tmp_path / "b" / "train-00000-of-00002.parquet", [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "b" / "train-00001-of-00002.parquet", [0, 1], ["cow", "dog"])
    with pytest.raises(UserError, match="cat, dog.*cow, dog"):
        load_source(str(tmp_path / "b"))


@pytest.mark.parametrize(
    "labels, classes, numbers",
    [
        ([10, 9, 100, 9], ["9", "10", "100"], [1, 0, 2, 0]),
        (["b", "a", "b", "c"], ["a", "b", "c"], [1, 0, 1, 2]),
        ([True, False, True, True], ["False", "True"], [1, 0, 1, 1]),
        (pa.array(["x", "y", "x", "x"]).dictionary_encode(), ["x", "y"], [0, 1, 0, 0]),
    ],
    ids=["integers", "strings", "booleans", "categories"],
)
@pytest.mark.parametrize("image", ["struct", "binary"])
def test_plain_labels_and_bytes_are_read(tmp_path, labels, classes, numbers, image):
    write_parquet(tmp_path / "train.parquet", labels, image=image)
    source = load_source(str(tmp_path))
    assert (source.classes, source.labels("train").tolist()) == (classes, numbers)
    assert [cell["bytes"] for cell in source.splits["train"].cells([2, 0])] == [png(2), png(0)]
    assert list(source.splits["train"].files) == [f"{i}.png" if image == "struct" else None for i in range(4)]


def test_a_label_without_a_name_is_refused_by_row_before_anything_is_decoded(tmp_path):
    write_parquet(tmp_path / "train.parquet", [1, 2, 3, 4], ["a", "b", "c", "d"])
    with pytest.raises(
        UserError, match="row 3 of train.parquet .* has the label 4, but there are 4 class names"
    ):
        load_source(str(tmp_path))


def test_where_several_columns_would_do_the_user_chooses(tmp_path):
    kinds = {
        "mask": datasets.Image(),
        "photo": datasets.Image(),
        "coarse": datasets.ClassLabel(names=["low", "high"]),
        "fine": datasets.ClassLabel(names=["a", "b", "c"]),
    }
    picture = {"bytes": png(1), "path": None}
    rows = {"mask": [picture] * 3, "photo": [picture] * 3, "coarse": [0, 1, 1], "fine": [0, 1, 2]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    data.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="mask, photo: choose one with --image-column"):
        load_source(str(tmp_path))
    with pytest.raises(UserError, match="coarse, fine: choose one with --label-column"):
        read(tmp_path, image_column="photo")
    source = load_source(str(tmp_path), Choices(image_column="photo", label_column="fine"))
    assert (source.classes, source.columns) == (["a", "b", "c"], ("photo", "fine"))
    assert "(column fine, images from column photo)" in source.describe()
    with pytest.raises(UserError, match="no column 'x' .--label-column., only mask"):
        read(tmp_path, image_column="photo", label_column="x")


def test_configurations_and_splits_are_chosen_by_name(tmp_path):
    for config, labels in (("small", ["a", "b"]), ("large", ["a", "b", "c"])):
        write_parquet(tmp_path / config / "train.parquet", labels)
        write_parquet(tmp_path / config / "unlabelled-00000-of-00001.parquet", labels)
    for card in (
        None,
        "configs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train.parquet\n"
            for config in ("small", "large")
        ),
    ):
        if card:
            (tmp_path / "README.md").write_text(f"---\n{card}---\n# Clothes\n")
        with pytest.raises(UserError, match="(small, large|large, small) with --dataset-config"):
            load_source(str(tmp_path))
        source = load_source(str(tmp_path), Choices(dataset_config="large"))
        assert len(source.splits["train"]) == 3
        assert "configuration large" in source.describe()
    shutil.rmtree(tmp_path / "small")
    (tmp_path / "README.md").unlink()
    assert "left out: unlabelled (split)" in load_source(str(tmp_path)).describe()
    assert read(tmp_path, test_split="unlabelled") == (["a", "b", "c"], {"train": 3, "test": 3})
    with pytest.raises(UserError, match="no split 'x', only"):
        read(tmp_path, test_split="x")


def test_the_class_names_of_a_card_go_by_their_numbers(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", [0, 2, 10])
    numbered = sorted(range(11), key=str)  # 0, 1, 10, 2, ...
    names = ", ".join(f"'{number}': class{number}" for number in numbered)
    features = "[{name: label, dtype: {class_label: {names: {%s}}}}]"
    card = f"---\ndataset_info:\n  config_name: plain\n  features: {features}\n---\n"
    (tmp_path / "README.md").write_text(card % names)
    source = load_source(str(tmp_path))
    assert [source.classes[label] for label in source.labels("train")] == ["class0", "class2", "class10"]
    (tmp_path / "README.md").write_text(card % "'0': a, '2': b")
    with pytest.raises(UserError, match="must number the classes of 'label' 0, 1, ..., but has 0, 2"):
        load_source(str(tmp_path))


def test_a_split_column_of_parquet_is_refused_and_one_of_a_table_is_followed(tmp_path):
    table = pa.table(
        {"image": [png(1)] * 4, "label": [0, 1, 0, 1], "Split": ["train", "train", "test", "test"]}
    )
    for number, part in enumerate((table[:2], table[2:])):
        pq.write_table(part, tmp_path / f"part-{number}.parquet")
    with pytest.raises(UserError, match="split train .* has a column 'split' with test and train"):
        load_source(str(tmp_path))
    (tmp_path / "part-1.parquet").unlink()
    assert read(tmp_path) == (["0", "1"], {"train": 2})
    for name in ("1.png", "2.png"):
        save(tmp_path / "t" / name)
    table = tmp_path / "t" / "labels.csv"
    table.write_text("file_name,label,Split\n1.png,a,train\n2.png,b,test\n")
    assert read(tmp_path / "t") == (["a", "b"], {"train": 1, "test": 1})
    table.unlink()
    rows = [{"file_name": "1.png", "label": "a"}, {"file_name": "2.png", "label": "b", "split": "test"}]
    table.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "t") == (["a", "b"], {"train": 1, "test": 1})


def test_a_row_with_too_many_cells_is_refused(tmp_path):
    for name in ("1.png", "2.png"):
        save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("file_name,label\n1.png,Bern\n2.png,Bern, CH\n")
    with pytest.raises(UserError, match="row 2 of labels.csv has more cells than the table has columns"):
        load_source(str(tmp_path))


def test_a_configuration_that_does_not_exist_and_one_split_for_two_are_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    with pytest.raises(UserError, match="has no configurations"):
        read(tmp_path, dataset_config="large")
    with pytest.raises(UserError, match="both x: name two splits"):
        read(tmp_path, train_split="x", test_split="x")


def test_a_folder_with_the_name_of_a_dataset_is_not_read_and_that_is_said(tmp_path, monkeypatch, capsys):
    make_image_folder(tmp_path / "digits", {"train": TWO})
    monkeypatch.chdir(tmp_path)
    assert len(load_source("digits").classes) == 10
    assert "For the folder, give ./digits" in capsys.readouterr().out
    assert load_source("./digits").classes == ["hat", "shoes"]


def test_a_card_gives_class_names_and_never_leads_outside(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [0, 1])
    names = "features: [{name: label, dtype: {class_label: {names: {'0': no, '1': 'yes'}}}}]"
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  {names}\n---\n")
    assert read(tmp_path)[0] == ["False", "yes"]  # YAML's "no" is false
    for text in (
        "---\n: [broken\n---\n",
        "---\n!!python/object:os.system x\n---\n",
        "\xff\xfe",
        "---\n- 1\n---\n",
    ):
        (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
        assert read(tmp_path)[0] == ["0", "1"]
    for path in ("http://127.0.0.1:1/x.parquet", "/etc/x.parquet", "../x.parquet"):
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {path}\n---\n")
        with pytest.raises(UserError, match="outside the dataset's folder"):
            load_source(str(tmp_path))


@pytest.mark.parametrize("path", ["/etc/hostname", "../out.png", "pipe.png", "no.png"])
def test_a_path_in_parquet_is_a_regular_file_inside_the_folder(tmp_path, path):
    save(tmp_path / "out.png")
    save(tmp_path / "data" / "in.png")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    cells = [{"bytes": None, "path": "in.png"}, {"bytes": None, "path": path}]
    images = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": images, "label": ["a", "b"]}), tmp_path / "data" / "train.parquet")
    cells = load_source(str(tmp_path / "data")).splits["train"].cells
    assert cells([0])[0]["path"] == str(tmp_path / "data" / "in.png")
    with pytest.raises(UserError, match="row 1 of split train"):
        cells([1])


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros"])
def test_a_broken_cache_of_datasets_is_built_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "data" / "train.parquet", ["a", "b"] * 50)
    load_source(str(tmp_path / "data"))
    (arrow,) = (tmp_path / "cache").rglob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "zeros": bytes(len(whole))}[damage])
    source = load_source(str(tmp_path / "data"))
    assert [cell["bytes"] for cell in source.splits["train"].cells([99])] == [png(99)]


# ---- D. Freshness --------------------------------------------------------------------------------


def test_a_picture_that_was_replaced_is_noticed_even_with_its_old_time_and_size(tmp_path):
    make_image_folder(tmp_path, {"train": TWO})
    picture = sorted((tmp_path / "train" / "hat").iterdir())[0]
    before, status = load_source(str(tmp_path)).splits["train"], picture.stat()
    pixels = np.asarray(Image.open(picture)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(tmp_path / "new.png")
    new = (tmp_path / "new.png").read_bytes()
    (tmp_path / "new.png").unlink()
    picture.write_bytes(new[: status.st_size].ljust(status.st_size, b"\0"))
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (picture.stat().st_size, picture.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert load_source(str(tmp_path)).splits["train"].fingerprint != before.fingerprint


# ---- The same pictures are the same training -----------------------------------------------------


def test_real_class_folders_and_a_table_of_the_same_pictures_train_bitwise_alike(clothing, tmp_path):
    weights = []
    for kind in ("folders", "table"):
        data = tmp_path / kind
        data.mkdir()
        for split in ("train", "validation"):
            (data / split).symlink_to(clothing / split)
        dataset = data
        if kind == "table":
            paths = [path.relative_to(clothing) for path in clothing.glob("*/*/*.jpg")]
            rows = [{"image": p, "class": p.parts[1], "split": p.parts[0]} for p in paths]
            dataset = write_table(data / "labels.csv", rows)
        flags = (
            "--image-size",
            32,
            "--limit-train",
            48,
            "--limit-eval",
            16,
            "--max-steps",
            3,
            "--batch-size",
            16,
        )
        out = ("--output-dir", tmp_path / f"out_{kind}", "--num-workers", 1)
        result = call("train", "--model", "cnn_small", "--dataset", dataset, *flags, *out)
        assert result.status == 0, result.err
        path = tmp_path / f"out_{kind}" / "checkpoints" / "cnn_small_final.safetensors"
        weights.append(read_tensors(path)[0])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
