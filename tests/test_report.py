"""What people read: tables, CSV, the confusion matrix."""

import csv

import matplotlib.image
import pytest
import torch
from sklearn.metrics import f1_score

from modeling import metrics, report
from modeling.engine import Predictions
from modeling.errors import UserError

ODD = [
    "cat's",
    "a,b",
    "$x_1$",
    "Ünïcode 犬",
    'quo"te',
    "-",
    "a very long class name that goes on and on",
    "0",
]


def evaluated(name="run", classes=ODD, n=200, seed=0, wrong=0.3, true_classes=None):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, true_classes or len(classes), (n,), generator=g)
    logits = 4 * torch.nn.functional.one_hot(labels, len(classes)) * (
        torch.rand(n, 1, generator=g) > wrong
    ) + torch.randn(n, len(classes), generator=g)
    p = Predictions(torch.arange(n) * 3, labels, logits.argmax(1), logits, torch.zeros(n))
    row = {
        "checkpoint": f"{name}.safetensors",
        "model": "cnn",
        "dataset": "d",
        "split": "test",
        "num_samples": n,
    }
    return report.Evaluated(
        name,
        {**row, **metrics.compute(p), "parameters": 10, "trainable_parameters": 5},
        p,
        classes,
        lambda row: f"test/{row}.png",
        "0123",
    )


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_csv_has_a_row_per_checkpoint_dataset_and_split(tmp_path):
    path = tmp_path / "metrics.csv"
    one, two = evaluated("one"), evaluated("two", seed=1)
    report.update_metrics_csv(path, [one.row])
    report.update_metrics_csv(path, [two.row])
    again = evaluated("one", seed=2)
    report.update_metrics_csv(path, [again.row])
    rows = read_csv(path)
    assert [row["checkpoint"] for row in rows] == ["one.safetensors", "two.safetensors"]
    assert float(rows[0]["accuracy"]) == again.row["accuracy"]
    assert tuple(rows[0]) == report.CSV_COLUMNS
    path.write_text("something,else\n1,2\n")
    with pytest.raises(ValueError, match="is not a metrics.csv of this program"):
        report.update_metrics_csv(path, [one.row])
    assert path.read_text() == "something,else\n1,2\n"


def test_predictions_can_be_read_back(tmp_path):
    one = evaluated()
    report.write_evaluation(tmp_path, one)
    rows = read_csv(tmp_path / "predictions_run.csv")
    assert list(rows[0]) == ["index", "true", "predicted", *(f"p({name})" for name in ODD), "file"]
    assert [int(row["index"]) for row in rows] == one.predictions.rows.tolist()
    assert rows[1]["file"] == "test/3.png"
    assert [ODD.index(row["true"]) for row in rows] == one.predictions.labels.tolist()
    assert [ODD.index(row["predicted"]) for row in rows] == one.predictions.predicted.tolist()
    for row, probabilities in zip(rows, one.predictions.probabilities, strict=True):
        assert [float(row[f"p({name})"]) for name in ODD] == pytest.approx(probabilities.tolist(), rel=1e-5)


def test_the_report_has_every_class_and_the_averages_of_metrics_csv(tmp_path):
    one = evaluated(true_classes=6)
    report.write_evaluation(tmp_path, one)
    text = (tmp_path / "classification_report_run.txt").read_text()
    assert all(name in text for name in ODD[:6])
    assert f"{one.row['macro_f1']:.4f}" in text
    assert f"{one.row['accuracy']:.4f}" in text


@pytest.mark.parametrize("count", [2, 10, 100, 300])
def test_the_confusion_matrix_is_a_picture_of_any_number_of_classes(tmp_path, count):
    classes = [f"{ODD[i % len(ODD)]} {i}" for i in range(count)]
    report.plot_confusion_matrix(tmp_path / "c.png", evaluated(classes=classes, n=50 * count))
    picture = matplotlib.image.imread(tmp_path / "c.png")
    height, width = picture.shape[:2]
    assert 300 < height < 5000
    assert 300 < width < 5000
    blue = (picture[..., 2] - picture[..., 0]) > 0.4
    assert blue.mean() > 0.002, "the diagonal is dark"


def test_the_comparison_ranks_and_subtracts():
    worse, better = evaluated("worse", wrong=0.5), evaluated("better", wrong=0.1)
    text = report.compare_evaluations([worse, better])
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[4:6]] == ["better", "worse"]
    difference = next(
        line for line in lines[lines.index("Differences from better") :] if line.startswith("worse")
    )
    assert f"{worse.row['accuracy'] - better.row['accuracy']:.4f}" in difference
    f1 = f1_score(better.predictions.labels, better.predictions.predicted, average=None)
    for name, value in zip(ODD, f1, strict=True):
        assert any(name in line and f"{value:.4f}" in line for line in lines)
    assert "different images" not in text
    worse.row["split"] = "validation"
    assert "different images" in report.compare_evaluations([worse, better])


def test_checkpoints_of_other_classes_keep_their_columns():
    few, many = evaluated("few", classes=["y", "z"], wrong=0.0), evaluated("many", classes=["x", "y", "z"])
    text = report.compare_evaluations([few, many])
    lines = text.splitlines()
    start = lines.index("F1 of each class")
    assert lines[start + 2].split() == ["class", "few", "many"]
    assert {line.split()[0] for line in lines[start + 4 : start + 7]} == {"x", "y", "z"}
    assert next(line for line in lines[start:] if line.startswith("x ")).split()[0] == "x"


def test_one_checkpoint_needs_no_differences():
    text = report.compare_evaluations([evaluated()])
    assert "Differences" not in text
    assert "macro avg" in text


def test_tables_align():
    rows = [
        {"model": name, "images_per_second": r, "parameters": n}
        for name, r, n in (("a", 12.345, 1234567), ("long name", 7.0, 1))
    ]
    assert report.compare_models(rows).splitlines() == [
        "model      images/s  parameters",
        "---------  --------  ----------",
        "a              12.3   1,234,567",
        "long name       7.0           1",
    ]


def test_the_predictions_of_many_classes_keep_the_five_largest_probabilities(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_PROBABILITIES", 1000)
    one = evaluated(n=200)
    report.write_evaluation(tmp_path, one)
    rows = read_csv(tmp_path / "predictions_run.csv")
    assert len(rows) == 200
    for row, probabilities in zip(rows, one.predictions.probabilities, strict=True):
        values, numbers = probabilities.topk(5)
        assert [row[f"class{place}"] for place in range(1, 6)] == [ODD[number] for number in numbers]
        written = [float(row[f"p{place}"]) for place in range(1, 6)]
        assert written == pytest.approx(values.tolist(), rel=1e-5)


HEADER = ",".join(report.CSV_COLUMNS)
ROW = ",".join("1" for _ in report.CSV_COLUMNS)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        f"{HEADER}\ncaf\xe9".encode("latin-1"),
        f"{HEADER}\n{'x' * 200_000}\n".encode(),
        f"{HEADER}\n{ROW},1\n".encode(),
        f"{HEADER}\n1,2\n".encode(),
        b"",
    ],
    ids=["bytes", "latin-1", "a long field", "a column more", "columns less", "empty"],
)
def test_a_file_in_the_place_of_metrics_csv_is_refused(content, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match="metrics.csv is not a metrics.csv of this program: move it away"):
        report.read_metrics_csv(path)
    path.write_text(f"{HEADER}\n{ROW}\n")
    assert report.read_metrics_csv(path) == [dict.fromkeys(report.CSV_COLUMNS, "1")]
