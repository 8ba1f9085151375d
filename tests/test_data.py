"""Sources, splits, decoding of any image, and the order of batches."""

import io

import datasets
import numpy as np
import pytest
import torch
from conftest import make_image_folder
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from modeling.data import decoding
from modeling.data.batches import training_steps
from modeling.data.images import Images, decode, native_size
from modeling.data.sources import load_source, select_rows, stratified


def ramp(height=24, width=16):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 10, x * 15, (x + y) * 6], axis=2).astype(np.uint8)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def test_any_mode_becomes_rgb_uint8():
    rgb = Image.fromarray(ramp())
    cases = {
        "L": encoded(rgb.convert("L")),
        "1": encoded(rgb.convert("1")),
        "P": encoded(rgb.convert("P", palette=Image.Palette.ADAPTIVE)),
        "RGBA": encoded(rgb.convert("RGBA")),
        "LA": encoded(rgb.convert("LA")),
        "CMYK": encoded(rgb.convert("CMYK"), "TIFF"),
        "YCbCr": encoded(rgb.convert("YCbCr"), "JPEG", quality=100, subsampling=0),
    }
    for mode, cell in cases.items():
        image = decoding.read_image(cell, "here")
        assert image.mode == "RGB"
        assert image.size == (16, 24)
        reference = Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
        assert np.array_equal(np.asarray(image), np.asarray(reference)), mode


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_not_clipped(dtype):
    deep = (np.arange(24 * 16).reshape(24, 16) * 170).astype(dtype)
    cell = encoded(Image.fromarray(deep), "TIFF")
    image = np.asarray(decoding.read_image(cell, "here"))
    assert np.array_equal(image[..., 0], (deep / 257).round().astype(np.uint8))
    assert image[..., 0].max() > 240
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(ramp())
    exif = Image.Exif()
    exif[0x0112] = orientation
    # the stored pixels are the inverse of the transformation that the orientation asks for
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if inverse is None else upright.transpose(inverse)
    image = decoding.read_image(encoded(stored, exif=exif), "here")
    assert np.array_equal(np.asarray(image), ramp())


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", encoded(Image.fromarray(ramp()))["bytes"][:-30]],
    ids=["empty", "text", "cut"],
)
def test_an_undecodable_image_is_named(content):
    with pytest.raises(ValueError, match="cannot decode image row 7"):
        decoding.read_image({"bytes": content, "path": None}, "row 7")


def test_a_broken_file_of_a_folder_is_named_by_its_path(tmp_path):
    folder = make_image_folder(tmp_path / "images", {"train": {"a": 4, "b": 4}})
    broken = folder / "train" / "b" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    source = load_source(str(folder))
    with pytest.raises(ValueError, match=str(broken)):
        decode(source, "train", torch.arange(8), image_size=None, num_workers=2)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    source = load_source("digits")
    sizes = {split: len(rows) for split, rows in source.splits.items()}
    assert sizes == {"train": 1438, "test": 359}
    assert source.classes == [str(d) for d in range(10)]
    images = decode(source, "test", torch.arange(359), image_size=None, num_workers=2)
    assert images.pixels.shape == (359, 3, 32, 32)
    # every digit stands in exactly one split, and the class shares are those of the whole
    both = torch.cat(
        [images.pixels, decode(source, "train", torch.arange(1438), image_size=None, num_workers=2).pixels]
    )
    small = torch.nn.functional.avg_pool2d(both[:, :1].float(), 4)[:, 0]
    reference = torch.from_numpy(load_digits().images).float() * (255 / 16)
    assert torch.cdist(small.flatten(1), reference.flatten(1)).argmin(dim=1).unique().numel() > 1780
    expected = np.bincount(load_digits().target) / 1797
    assert np.abs(source.labels("test").bincount().numpy() / 359 - expected).max() < 0.003


def test_parquet_and_image_folder_are_read_by_features_not_by_names(tmp_path):
    features = datasets.Features(
        {
            "tag": datasets.ClassLabel(names=["x", "y"]),
            "photo": datasets.Image(),
            "id": datasets.Value("int64"),
        }
    )
    rows = {"tag": [1, 0, 1], "photo": [Image.fromarray(ramp() + i) for i in range(3)], "id": [7, 8, 9]}
    (tmp_path / "p").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "p" / "train.parquet")
    source = load_source(str(tmp_path / "p"))
    assert (source.image_column, source.label_column, source.classes) == ("photo", "tag", ["x", "y"])
    images = decode(source, "train", torch.tensor([0, 2]), image_size=None, num_workers=1)
    assert torch.equal(images.gather(torch.tensor([1]))[0][0], torch.from_numpy(ramp() + 2).permute(2, 0, 1))
    assert images.labels.tolist() == [1, 1]
    assert images.rows.tolist() == [0, 2]

    folder = make_image_folder(
        tmp_path / "f", {"train": {"cat's": 3, "Ünïcode dog": 2, "a,b $x$ [1]": 2}, "val": {"cat's": 1}}
    )
    source = load_source(str(folder))
    assert source.classes == sorted(["cat's", "Ünïcode dog", "a,b $x$ [1]"])
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 7, "validation": 1}


@pytest.mark.parametrize(
    "counts, message",
    [
        ({}, "no dataset could be read"),
        ({"train": {"only": 3}}, "class"),
        ({"train": {}}, "no dataset could be read"),
    ],
    ids=["empty", "one class", "no classes"],
)
def test_a_useless_folder_is_refused(tmp_path, counts, message):
    folder = tmp_path / "images"
    folder.mkdir()
    make_image_folder(folder, counts)
    with pytest.raises(ValueError, match=message):
        load_source(str(folder))


def test_stratified_takes_each_class_by_its_share():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    for n in (0, 1, 10, 37, 99, 100):
        chosen = stratified(labels, n, 42, 1)
        assert len(chosen) == n == len(chosen.unique())
        counts = labels[chosen].bincount(minlength=3)
        assert (counts - torch.tensor([0.5, 0.3, 0.2]) * n).abs().max() < 1
    assert torch.equal(stratified(labels, 20, 42, 1), stratified(labels, 20, 42, 1))
    assert not torch.equal(stratified(labels, 20, 42, 1), stratified(labels, 20, 43, 1))
    sorted_labels = labels.sort().values  # never the first n
    assert stratified(sorted_labels, 10, 42, 1)[0] != 0 or stratified(sorted_labels, 10, 42, 1)[1] != 1


def test_train_and_validation_divide_the_train_split():
    source = load_source("digits")
    options = dict(val_fraction=0.1, seed=42)
    own, train = select_rows(source, "train", **options)
    _, validation = select_rows(source, "validation", **options)
    assert own == "train"
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(1438))
    assert len(validation) == 144
    _, limited = select_rows(source, "train", limit_train=100, **options)
    assert len(limited) == 100
    assert set(limited.tolist()) < set(train.tolist())
    _, limited = select_rows(source, "test", limit_eval=50, **options)
    assert source.labels("test")[limited].bincount().tolist() == [5] * 10
    _, other = select_rows(source, "validation", val_fraction=0.1, seed=43)
    assert not torch.equal(validation, other)


def test_a_validation_split_of_its_own_is_used_as_it_is(tmp_path):
    source = load_source(
        str(make_image_folder(tmp_path, {"train": {"a": 5, "b": 5}, "validation": {"a": 2, "b": 2}}))
    )
    assert select_rows(source, "train", val_fraction=0.5, seed=1)[1].tolist() == list(range(10))
    assert select_rows(source, "validation", val_fraction=0.5, seed=1)[0] == "validation"
    with pytest.raises(ValueError, match="no split 'test', only train, validation"):
        select_rows(source, "test", val_fraction=0.5, seed=1)


def test_images_of_many_shapes_keep_their_pixels_and_large_ones_are_reduced(tmp_path):
    folder = tmp_path / "images"
    shapes = {"a": (40, 30), "b": (20, 90), "c": (600, 400)}
    for name, (h, w) in shapes.items():
        make_image_folder(folder, {"train": {name: 1}}, size=(h, w))
    source = load_source(str(folder))
    images = decode(source, "train", torch.arange(3), image_size=32, num_workers=2)
    assert images.sizes.tolist() == [[40, 30], [20, 90], [384, 256]]
    original = torch.from_numpy(np.array(Image.open(folder / "train" / "a" / "0.png"))).permute(2, 0, 1)
    batch, sizes = images.gather(torch.tensor([1, 0]))
    assert batch.shape == (2, 3, 40, 90)
    assert torch.equal(batch[1, :, :40, :30], original)
    assert not batch[1, :, :, 30:].any()
    assert sizes.tolist() == [[20, 90], [40, 30]]
    reduced = Image.open(folder / "train" / "c" / "0.png").resize((256, 384), Image.Resampling.BICUBIC)
    difference = TF.pil_to_tensor(reduced).int() - images.pixels[2].int()
    assert difference.abs().float().mean() < 2
    large = decode(source, "train", torch.arange(3), image_size=350, num_workers=2)
    assert large.sizes.tolist()[2] == [600, 400]
    assert native_size(images) == 224


def test_threads_change_nothing_not_even_a_bit(clothing):
    source = load_source(str(clothing))
    rows = torch.arange(0, 3000, 20)
    none, two = (decode(source, "train", rows, image_size=64, num_workers=n) for n in (0, 2))
    assert isinstance(none.pixels, list)
    assert all(torch.equal(a, b) for a, b in zip(none.pixels, two.pixels, strict=True))
    assert torch.equal(none.sizes, two.sizes)


def test_split_folders_in_any_case_and_never_two_for_one_split(tmp_path):
    folder = make_image_folder(tmp_path / "a", {"Train": {"x": 3, "y": 3}, "Test": {"x": 2, "y": 1}})
    assert {split: len(rows) for split, rows in load_source(str(folder)).splits.items()} == {
        "train": 6,
        "test": 3,
    }
    make_image_folder(folder, {"testing": {"x": 2, "y": 1}})
    with pytest.raises(ValueError, match="Test and testing are both the test split"):
        load_source(str(folder))


def test_classes_called_as_splits_are_classes(tmp_path, capsys):
    make_image_folder(tmp_path / "flat", {".": {"test": 3, "zz": 4}})
    source = load_source(str(tmp_path / "flat"))
    assert (source.classes, {split: len(rows) for split, rows in source.splits.items()}) == (
        ["test", "zz"],
        {"train": 7},
    )
    make_image_folder(tmp_path / "deep", {"train": {"a": 3, "test": 4}, "spare": {"a": 1}})
    source = load_source(str(tmp_path / "deep"))
    assert (source.classes, {split: len(rows) for split, rows in source.splits.items()}) == (
        ["a", "test"],
        {"train": 7},
    )
    assert "left out: spare" in capsys.readouterr().out


def test_a_split_without_labels_is_left_out_and_said_so(tmp_path, capsys):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    for split, labels in (("train", [0, 1, 1]), ("test", [-1, -1, -1])):
        rows = {"image": [Image.fromarray(ramp())] * 3, "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    assert set(load_source(str(tmp_path)).splits) == {"train"}
    assert "Split test" in capsys.readouterr().out
    rows["label"] = [0, 1, -1]
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="row 2 of split test has no label"):
        load_source(str(tmp_path)).labels("test")


def test_a_panorama_is_reduced_by_its_long_side():
    assert decoding.reduced(Image.new("RGB", (10000, 10)), 256).size == (768, 1)
    assert decoding.reduced(Image.new("RGB", (700, 100)), 256).size == (700, 100)


def steps(n=23, **options):
    labels = torch.arange(n) % 4
    pixels, sizes, where = (
        torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2),
        torch.full((n, 2), 2),
        torch.arange(n),
    )
    images = Images(pixels, where, sizes, labels, where + 100, [])
    return list(training_steps(images, **({"seed": 1, "epoch": 0, "batch_size": 8} | options)))


def test_an_epoch_has_every_image_once_in_an_order_of_seed_and_epoch():
    order = torch.cat([batch.indices for step in steps() for batch in step])
    assert torch.equal(order.sort().values, torch.arange(100, 123))
    assert [len(step[0].labels) for step in steps()] == [8, 8, 7]
    for batch in (b for step in steps() for b in step):
        assert torch.equal(batch.images[:, 0, 0, 0].long() + 100, batch.indices)
        assert torch.equal(batch.labels, (batch.indices - 100) % 4)
    assert torch.equal(order, torch.cat([b.indices for step in steps() for b in step]))
    assert not torch.equal(order, torch.cat([b.indices for step in steps(epoch=1) for b in step]))
    assert not torch.equal(order, torch.cat([b.indices for step in steps(seed=2) for b in step]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_global_batches_do_not_depend_on_processes_or_accumulation(world_size, accumulation):
    n = 21  # the last batch of 5 leaves some of 8 processes nothing
    reference = [step[0].indices for step in steps(n)]
    ranks = [
        steps(n, accumulation=accumulation, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for number, expected in enumerate(reference):
        micro_batches = [rank[number] for rank in ranks]
        assert len({len(m) for m in micro_batches}) == 1, "every rank runs as many micro-batches"
        counted = torch.cat([b.indices[b.weights > 0] for m in micro_batches for b in m])
        assert torch.equal(counted, expected)
        assert all(len(b.indices) for m in micro_batches for b in m), "no rank runs an empty batch"


def test_mixing_partners_are_a_permutation_of_the_global_batch_whoever_loads_it():
    def pairs(ranks):
        found = [[], [], []]
        for rank in ranks:
            for number, step in enumerate(rank):
                for b in step:
                    found[number] += list(
                        zip(b.indices[b.own].tolist(), b.indices[b.partner].tolist(), strict=True)
                    )
        return [sorted(f) for f in found]

    whole = pairs([steps(mix=True)])
    for step, expected in zip(whole, steps(), strict=True):
        assert (
            sorted(own for own, _ in step)
            == sorted(partner for _, partner in step)
            == expected[0].indices.sort().values.tolist()
        )
    assert sum(own != partner for own, partner in whole[0]) >= 4
    assert pairs([steps(mix=True, rank=r, world_size=3, accumulation=2) for r in range(3)]) == whole


def test_equal_images_have_equal_fingerprints():
    source = load_source("digits")
    one, same, other = (
        decode(source, "train", rows, image_size=None, num_workers=2)
        for rows in map(torch.arange, (20, 20, 21))
    )
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
