"""The comparison: what is kept of a checkpoint, who is ranked and paired with whom, and the text of it."""

import csv
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_models import (
    answers_of_right,
    fake_answers,
    fake_header,
    fake_labels,
    fake_model,
    log_softmax,
    model_of_right,
)
from scipy import stats
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    log_loss,
    top_k_accuracy_score,
)

from modeling import comparison_text, cost, scores
from modeling.answers import Answers, Model, summarize, top_k_accuracy
from modeling.compare import Comparison, compare, group_runs
from modeling.errors import UserError
from modeling.stats import runs
from modeling.stats.classes import class_scores
from modeling.stats.proportions import mcnemar_midp, tango_interval
from modeling.suspects import find_suspects, twins_with_other_label

NO_COSTS = cost.Costs({})


def changed(answers: Answers, **values) -> Answers:
    return dataclasses.replace(answers, **values)


def assert_same_model(one: Model, two: Model) -> None:
    for field in dataclasses.fields(Model):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name


# ---- What is kept of a checkpoint ----------------------------------------------------------------


def test_losses_are_scikit_learns():
    labels = fake_labels(500, 7)
    answers = fake_answers("a", labels, 7)
    model = summarize(answers)
    p = np.exp(answers.log_probabilities.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    assert model.loss.mean() == pytest.approx(log_loss(labels, p, labels=range(7)), rel=1e-6)
    brier = brier_score_loss(labels, p, labels=range(7), scale_by_half=False)
    assert model.brier.mean() == pytest.approx(brier, rel=1e-6)
    assert model.confidence == pytest.approx(p.max(axis=1), rel=1e-6)
    assert model.label_probability == pytest.approx(p[np.arange(500), labels], rel=1e-6)
    assert np.array_equal(model.predicted, p.argmax(axis=1))
    assert model.fitted_loss.mean() < model.loss.mean(), "this model is too unsure"


def test_a_log_probability_beyond_float32s_smallest_number_is_a_finite_loss():
    logs = log_softmax(np.array([[500.0, 0.0], [0.0, 500.0]]))
    model = summarize(changed(fake_answers("a", np.array([1, 1]), 2), log_probabilities=logs))
    assert model.loss.tolist() == [500.0, 0.0]
    assert model.label_probability[0] == pytest.approx(0, abs=1e-200)
    assert np.isfinite(model.tempered_label).all()


def test_a_constant_added_to_the_logits_changes_nothing():
    labels = fake_labels(200, 4)
    logits = np.random.default_rng(0).normal(size=(200, 4)) * 3
    plain, moved = (
        summarize(changed(fake_answers("a", labels, 4), log_probabilities=log_softmax(logits + constant)))
        for constant in (0.0, 100.0)
    )
    assert np.array_equal(plain.predicted, moved.predicted)
    assert np.allclose(plain.loss, moved.loss, atol=1e-4)
    assert plain.temperature == pytest.approx(moved.temperature, rel=1e-3)


@pytest.mark.parametrize("rounding", [None, 1])
def test_top5_is_scikit_learns_also_with_ties(rounding):
    labels = fake_labels(400, 30)
    answers = fake_answers("a", labels, 30, skill=1.0)
    logs = answers.log_probabilities if rounding is None else answers.log_probabilities.round(rounding)
    model = summarize(changed(answers, log_probabilities=logs))
    interval, worst = top_k_accuracy(model, 5)
    assert interval.value == pytest.approx(top_k_accuracy_score(labels, logs, k=5, labels=range(30)))
    assert (worst == interval.value) if rounding is None else (worst < interval.value)


def test_the_order_of_the_images_changes_nothing():
    answers = fake_answers("a", fake_labels(300, 4), 4, rows=np.arange(300) * 2)
    shuffled = np.random.default_rng(0).permutation(300)
    again = changed(
        answers,
        rows=answers.rows[shuffled],
        labels=answers.labels[shuffled],
        log_probabilities=answers.log_probabilities[shuffled],
    )
    assert_same_model(summarize(answers), summarize(again))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_by_name(bad):
    answers = fake_answers("a", fake_labels(20, 3), 3)
    logs = answers.log_probabilities.copy()
    logs[3, 1] = logs[7, 2] = bad
    with pytest.raises(
        UserError, match="checkpoints/a_best.safetensors gives NaN or infinite logits for 2 of 20"
    ):
        summarize(changed(answers, log_probabilities=logs))


def test_half_precision_keeps_the_probabilities_only():
    answers = fake_answers("a", fake_labels(100, 3), 3)
    full, half = summarize(answers), summarize(answers, keep=np.float16)
    assert half.probabilities.dtype == np.float16
    assert np.allclose(half.probabilities, full.probabilities, atol=1e-3)
    assert np.array_equal(half.loss, full.loss)


@pytest.mark.parametrize("num_images", [1, 2, 50])
@pytest.mark.parametrize("predicts", ["the labels", "another class", "one class"])
def test_corner_cases_have_numbers(num_images, predicts):
    labels = np.zeros(num_images, int) if predicts != "one class" else np.arange(num_images) % 2
    logits = np.tile([4.0, 0.0, -1.0], (num_images, 1))
    if predicts == "another class":
        logits = np.tile([0.0, 4.0, -1.0], (num_images, 1))
    model = summarize(changed(fake_answers("a", labels, 3), log_probabilities=log_softmax(logits)))
    (found,) = scores.score_models([model])
    assert found.accuracy.value == (0 if predicts == "another class" else (labels == 0).mean())
    for field in ("accuracy", "macro_f1", "balanced_accuracy", "log_loss", "brier", "gap"):
        assert np.isfinite(getattr(found, field)).all(), field
    assert found.verdict in ("honest", "too sure", "too unsure", "uneven")
    assert sum(one.num_images for one in found.bins) == num_images
    comparison = compare([model])
    assert comparison.entries[0].rank_text == "1"
    assert comparison.pairs == []


# ---- Scores --------------------------------------------------------------------------------------


def test_scores_equal_those_of_scikit_learn_and_lie_in_their_intervals():
    labels = fake_labels(600, 5)
    models = [
        fake_model(name, labels, 5, skill=skill, seed=seed)
        for name, skill, seed in (("a", 2, 1), ("b", 1, 2))
    ]
    for model, found in zip(models, scores.score_models(models), strict=True):
        assert found.macro_f1.value == pytest.approx(f1_score(labels, model.predicted, average="macro"))
        assert found.balanced_accuracy.value == pytest.approx(
            balanced_accuracy_score(labels, model.predicted)
        )
        assert found.gap.value == pytest.approx(model.confidence.mean() - (model.predicted == labels).mean())
        for interval in (
            found.accuracy,
            found.macro_f1,
            found.balanced_accuracy,
            found.log_loss,
            found.brier,
            found.gap,
        ):
            assert interval.low < interval.value < interval.high
        standard_error = model.loss.std() / np.sqrt(600)
        assert found.log_loss.high - found.log_loss.low == pytest.approx(3.92 * standard_error, rel=0.1)


def test_scores_do_not_depend_on_the_other_models():
    labels = fake_labels(200, 3)
    a, b = fake_model("a", labels, 3, seed=1), fake_model("b", labels, 3, seed=2)
    shorter = fake_model("c", labels[:150], 3, seed=3)
    alone = scores.score_models([a])[0]
    for together in (scores.score_models([b, a])[1], scores.score_models([shorter, a])[1]):
        assert together.log_loss == pytest.approx(alone.log_loss)
        assert together.macro_f1 == pytest.approx(alone.macro_f1)
        assert together.honest_limit == alone.honest_limit


def test_verdicts_on_confidence():
    n = 1000
    right = np.random.default_rng(0).random(n)
    assert scores.score_models([model_of_right("honest", right < 0.9)])[0].verdict == "honest"
    assert scores.score_models([model_of_right("sure", right < 0.8)])[0].verdict == "too sure"
    assert scores.score_models([model_of_right("unsure", right < 0.97)])[0].verdict == "too unsure"
    # sure and unsure halves cancel in the mean
    confidence = np.repeat([0.95, 0.65], n // 2)
    is_right = np.concatenate([right[: n // 2] < 0.8, right[n // 2 :] < 0.8])
    logs = np.log(np.where(is_right[:, None] ^ [False, True], confidence[:, None], 1 - confidence[:, None]))
    answers = answers_of_right("uneven", is_right)
    model = summarize(changed(answers, labels=np.zeros(n, int), log_probabilities=logs.astype(np.float32)))
    assert scores.score_models([model])[0].verdict == "uneven"


# ---- Pairs and ranks -----------------------------------------------------------------------------


def rights(*num_right: int, n: int = 200) -> list[Model]:
    """Models a, b, c ... that are right on the first so many images."""
    return [model_of_right(name, np.arange(n) < k) for name, k in zip("abcdef", num_right, strict=False)]


def test_pairs_and_ranks_by_hand():
    comparison = compare(rights(150, 190, 152))
    assert [entry.name for entry in comparison.entries] == ["b", "c", "a"]
    assert [entry.rank_text for entry in comparison.entries] == ["1", "2=", "2="]
    found = {(pair.a, pair.b): pair for pair in comparison.pairs}
    assert set(found) == {(0, 1), (0, 2), (1, 2)}
    assert (found[1, 2].only_a, found[1, 2].only_b, found[1, 2].verdict) == (2, 0, "not told apart")
    assert found[0, 2].difference == tango_interval(40, 0, 200)
    assert found[0, 2].p == mcnemar_midp(40, 0)
    assert found[1, 2].corrected_p == found[1, 2].p, "the largest of the three"
    assert found[0, 1].corrected_p == pytest.approx(2 * found[0, 1].p), "the second smallest"
    assert comparison.pair(0, 2) is found[0, 2]
    assert comparison.pair(2, 0) is None


def test_a_hint_is_what_the_correction_takes_away():
    # a and b differ by 6 images: p = 0.016, three comparisons
    comparison = compare(rights(100, 106, 103))
    verdicts = {(pair.a, pair.b): (pair.verdict, pair.p, pair.corrected_p) for pair in comparison.pairs}
    assert verdicts[0, 2] == ("real", pytest.approx(0.015625), pytest.approx(0.046875))
    comparison = compare(rights(100, 105, 103))
    verdict, p, corrected = {
        (pair.a, pair.b): (pair.verdict, pair.p, pair.corrected_p) for pair in comparison.pairs
    }[0, 2]
    assert verdict == "a hint"
    assert p < 0.05 < corrected


def test_the_order_of_the_models_changes_nothing_but_ties():
    labels = fake_labels(400, 5)
    models = [
        fake_model(name, labels, 5, skill=skill, seed=k)
        for k, (name, skill) in enumerate(zip("abcd", (1, 2.5, 2, 1.5), strict=True))
    ]
    expected = comparison_text.pairs_csv(compare(models))
    for order in ([3, 1, 0, 2], [2, 0, 3, 1]):
        again = compare([models[k] for k in order])
        assert comparison_text.pairs_csv(again) == expected
        assert [entry.rank for entry in again.entries] == [entry.rank for entry in compare(models).entries]


def test_the_images_shuffled_change_nothing():
    labels = fake_labels(400, 5)
    a, b = (fake_answers(name, labels, 5, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    order = np.random.default_rng(0).permutation(400)
    moved = changed(
        b, rows=b.rows[order], labels=b.labels[order], log_probabilities=b.log_probabilities[order]
    )
    plain, shuffled = compare([summarize(a), summarize(b)]), compare([summarize(a), summarize(moved)])
    assert plain.pairs == shuffled.pairs


def test_identical_models_are_not_told_apart():
    comparison = compare(rights(150, 150))
    (pair,) = comparison.pairs
    assert pair.is_identical
    assert (pair.p, pair.verdict, pair.difference.value) == (1.0, "not told apart", 0.0)
    assert [entry.rank_text for entry in comparison.entries] == ["1=", "1="]
    assert comparison.visible_difference() is None


def test_the_visible_difference_is_of_the_pair_that_disagrees_least():
    pair, difference = compare(rights(150, 190, 152, 152)).visible_difference()
    assert (pair.only_a, pair.only_b) == (2, 0)
    assert difference == pytest.approx(2.8016 * np.sqrt(0.01 / 200), rel=1e-4)


def test_many_models_show_the_best_against_each_and_neighbours():
    comparison = compare(rights(100, 110, 120, 130, 140, 150))
    shown = {(pair.a, pair.b) for pair in comparison.pairs_to_show()}
    assert shown == {(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (2, 3), (3, 4), (4, 5)}
    four = compare(rights(100, 110, 120, 130))
    assert four.pairs_to_show() == four.pairs
    assert len(four.pairs) == 6


# ---- Other images, other classes -----------------------------------------------------------------


def test_models_of_another_dataset_split_or_class_are_not_compared():
    labels = fake_labels(300, 3)
    main = [fake_model(name, labels, 3, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    others = [
        fake_model("dataset", labels, 3, dataset="cifar10", skill=9),
        fake_model("split", labels, 3, split="validation", skill=9),
        fake_model("images", labels, 3, images_sha256="4567", skill=9),
        fake_model("classes", labels, 3, classes=["x", "y", "z"], skill=9),
    ]
    comparison = compare([others[0], *main, *others[1:]])
    assert {entry.name for entry in comparison.entries[:2]} == {"a", "b"}
    assert [entry.rank_text for entry in comparison.entries[2:]] == ["-"] * 4
    assert len(comparison.pairs) == 1
    assert comparison.shared.entries == [0, 1]


def test_classes_in_another_order_are_matched_by_name():
    labels = fake_labels(300, 3)
    a = fake_answers("a", labels, 3, seed=1, classes=["x", "y", "z"])
    b = fake_answers("b", labels, 3, seed=2, classes=["x", "y", "z"])
    order = [2, 0, 1]  # b's class i is the old class order[i]
    new_number = np.argsort(order)
    reordered = changed(
        b, classes=["z", "x", "y"], labels=new_number[labels], log_probabilities=b.log_probabilities[:, order]
    )
    plain, mixed = compare([summarize(a), summarize(b)]), compare([summarize(a), summarize(reordered)])
    assert plain.pairs == mixed.pairs
    names = [entry.name for entry in mixed.entries]
    one, two = plain.shared.models[names.index("b")], mixed.shared.models[names.index("b")]
    assert mixed.shared.classes == mixed.shared.models[0].classes == mixed.shared.models[1].classes
    to_name = np.array(mixed.shared.classes)
    assert np.array_equal(to_name[two.labels], np.array(plain.shared.classes)[one.labels])
    assert np.array_equal(to_name[two.predicted], np.array(plain.shared.classes)[one.predicted])
    columns = [two.classes.index(name) for name in one.classes]
    assert np.array_equal(two.probabilities[:, columns], one.probabilities)


def seen(name: str, rows: np.ndarray, seed: int = 0, **options) -> Model:
    labels = fake_labels(1000, 3)
    return fake_model(name, labels[rows], 3, rows=rows, seed=seed, **options)


def test_different_images_are_compared_on_the_common_ones_if_there_are_100():
    a, b = seen("a", np.arange(0, 500), seed=1), seen("b", np.arange(400, 1000), seed=2)
    comparison = compare([a, b])
    (pair,) = comparison.pairs
    assert pair.num_images == 100
    assert comparison.shared.rows.tolist() == list(range(400, 500))
    best, other = comparison.shared.models
    assert pair.only_a == (best.right & ~other.right).sum()
    assert np.array_equal(best.labels, other.labels)
    text = "\n".join(comparison_text.terminal_lines(comparison, NO_COSTS))
    assert "on 100 common images" in text


def test_fewer_than_100_common_images_are_not_compared():
    a, b = seen("a", np.arange(0, 500), seed=1, skill=1), seen("b", np.arange(401, 1000), seed=2, skill=3)
    comparison = compare([a, b])
    assert comparison.pairs == []
    assert [entry.rank_text for entry in comparison.entries] == ["-", "-"]
    assert [entry.name for entry in comparison.entries] == ["b", "a"]
    assert comparison.shared.entries == [0]
    assert "not compared, because their images or classes differ: b, a" in comparison_text.caution_lines(
        comparison
    )


def test_few_images_are_compared_where_all_models_saw_them():
    assert len(compare(rights(3, 5, n=7)).pairs) == 1


def test_without_100_images_in_common_the_largest_group_that_saw_the_same_is_shared():
    first, second, third = np.arange(0, 400), np.arange(250, 650), np.arange(550, 950)
    models = [
        seen("a", first, seed=1),
        seen("b", second, seed=2),
        seen("c", second, seed=3),
        seen("d", third, seed=4),
    ]
    comparison = compare(models)
    assert all(entry.rank is not None for entry in comparison.entries)
    names = {comparison.entries[k].name for k in comparison.shared.entries}
    assert names == {"b", "c"}
    assert np.array_equal(comparison.shared.rows, second)
    assert {(pair.num_images) for pair in comparison.pairs} == {150, 100, 400}


# ---- Runs of a recipe ----------------------------------------------------------------------------


def run_of(name: str, seed: int, num_right: int, kind: str = "best", **arguments) -> Model:
    header = fake_header("cnn", seed=seed, **{"run_name": name, **arguments})
    right = np.random.default_rng(seed).permutation(400) < num_right
    return model_of_right(name, right, header=header, path=Path(f"checkpoints/{name}_{kind}.safetensors"))


def test_runs_with_other_seeds_are_one_entry():
    models = [run_of(f"r{seed}", seed, 300 + seed) for seed in (1, 2, 30)]
    other = run_of("slow", 1, 200, lr=0.1)
    comparison = compare([*models, other])
    best, worst = comparison.entries
    assert [run.name for run in best.runs] == ["r1", "r2", "r30"]
    assert (best.name, worst.name) == ("cnn", "slow")
    assert best.accuracy == runs.mean_of_runs(np.stack([model.right for model in models]))
    assert best.shown.name == "r2", "311 / 400 is the mean; 302 is nearest"
    (pair,) = comparison.pairs
    expected = runs.paired_difference(np.stack([m.right for m in models]), other.right[None])
    assert (pair.difference, pair.p) == (expected.interval, expected.p)
    assert pair.p != pytest.approx(float(mcnemar_midp(round(pair.only_a), round(pair.only_b))))
    assert [len(one) for one in comparison.shared.right] == [3, 1]
    assert comparison.visible_difference() is None
    assert best.log_loss == pytest.approx(np.mean([m.loss.mean() for m in models]))
    assert "one run of slow: another seed changes the accuracy too" in comparison_text.caution_lines(
        comparison
    )


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"mixed_precision": "bf16"}])
def test_runs_of_other_settings_are_other_entries(change):
    assert len(group_runs([run_of("a", 1, 300), run_of("b", 2, 300, **change)])) == 2


def test_best_and_final_of_one_run_are_not_runs_of_a_recipe():
    models = [run_of("a", 1, 300), run_of("a_final", 1, 310, kind="final")]
    assert len(group_runs(models)) == 2
    # nor are two files of one seed, whatever they are called
    assert len(group_runs([run_of("a", 1, 300), run_of("b", 1, 300), run_of("c", 2, 300)])) == 3
    # but the best of three seeds and the final of three seeds are two recipes
    both = [run_of(f"{kind}{seed}", seed, 300, kind=kind) for seed in (1, 2, 3) for kind in ("best", "final")]
    assert [[run.name for run in group] for group in group_runs(both)] == [
        ["best1", "best2", "best3"],
        ["final1", "final2", "final3"],
    ]


def test_two_recipes_of_one_model_have_different_names():
    first = [run_of(f"a{seed}", seed, 300) for seed in (1, 2)]
    second = [run_of(f"b{seed}", seed, 200, lr=0.1) for seed in (1, 2)]
    assert [entry.name for entry in compare([*first, *second]).entries] == ["cnn", "b1"]
    alone = run_of("cnn", 9, 100, lr=0.2)
    assert [entry.name for entry in compare([*first, alone]).entries] == ["a1", "cnn"]


def test_runs_that_drew_other_images_have_an_interval_of_their_accuracies():
    rows = [np.arange(0, 300), np.arange(150, 450), np.arange(300, 600)]
    models = [
        seen(f"r{seed}", rows[seed], seed=seed, split="validation", header=fake_header(seed=seed))
        for seed in (0, 1, 2)
    ]
    (entry,) = compare(models).entries
    accuracies = [model.right.mean() for model in models]
    expected = stats.t.interval(0.95, 2, np.mean(accuracies), stats.sem(accuracies))
    assert entry.accuracy[1:] == pytest.approx((expected[0], min(1, expected[1])))


# ---- Text ----------------------------------------------------------------------------------------


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def three_models() -> Comparison:
    return compare(rights(150, 190, 152))


def test_the_terminal_shows_ranks_pairs_in_words_and_the_caution():
    speed = cost.Speed(batch_ms=6.4, single_ms=13.0, spread=1.1)
    costs = cost.Costs({"b": cost.Cost(parameters=5526346, speed=speed), "c": cost.Cost(parameters=17)})
    assert comparison_text.terminal_lines(three_models(), costs) == [
        "rank  model  accuracy     95 % interval  log loss  too sure  ms/image  parameters",
        "1     b        0.9500  0.9104 to 0.9726     0.215    -0.050      6.40   5,526,346",
        "2=    c        0.7600  0.6963 to 0.8139     0.633    +0.140                    17",
        "2=    a        0.7500  0.6857 to 0.8049     0.655    +0.150",
        "b over c: +19.0 points (+14.2 to +25.0), p < 0.001 (corrected for 3 comparisons): real",
        "b over a: +20.0 points (+15.0 to +26.1), p < 0.001 (corrected for 3 comparisons): real",
        "c over a: +1.0 points (-0.9 to +3.6), p = 0.250 (corrected for 3 comparisons): not told apart",
        "one run of each: another seed changes the accuracy too",
    ]


def test_one_model_is_one_line_of_the_ranking():
    lines = comparison_text.terminal_lines(compare(rights(150)), NO_COSTS)
    assert len(lines) == 2
    assert lines[1].startswith("1     a        0.7500  0.6857 to 0.8049")


def test_one_comparison_is_not_corrected_and_models_that_agree_say_so():
    lines = comparison_text.terminal_lines(compare(rights(150, 190)), NO_COSTS)
    assert "b over a: +20.0 points (+15.0 to +26.1), p < 0.001: real" in lines
    lines = comparison_text.terminal_lines(compare(rights(150, 150)), NO_COSTS)
    assert "a and b are right on exactly the same images" in lines


def test_p_values_never_hide_on_which_side_of_the_level_they_are():
    assert [comparison_text.p_text(p) for p in (0.0004, 0.051, 0.0496, 0.0504, 1.0)] == [
        "< 0.001",
        "= 0.051",
        "= 0.0496",
        "= 0.0504",
        "= 1.000",
    ]
    assert [comparison_text.points(v) for v in (0.022, -0.0004, 0.0, -0.009)] == [
        "+2.2",
        "0.0",
        "0.0",
        "-0.9",
    ]


def test_pairs_csv_has_every_pair():
    comparison = three_models()
    rows = read(comparison_text.pairs_csv(comparison))
    assert [(row["model_a"], row["model_b"]) for row in rows] == [("b", "c"), ("b", "a"), ("c", "a")]
    for row, pair in zip(rows, comparison.pairs, strict=True):
        assert float(row["difference"]) == pytest.approx(pair.difference.value, rel=1e-5)
        assert float(row["corrected_p"]) == pytest.approx(pair.corrected_p, rel=1e-5)
        assert (row["images"], row["verdict"]) == ("200", pair.verdict)
    assert read(comparison_text.pairs_csv(compare(rights(150)))) == []


def test_class_metrics_csv_has_a_row_for_each_class_with_images_and_each_model():
    labels = np.random.default_rng(0).choice([0, 1, 3], 300)
    names = ["cat, dog", 'qu"ote', "absent", "犬"]
    models = [fake_model(name, labels, 4, seed=seed, classes=names) for name, seed in (("a", 1), ("b", 2))]
    comparison = compare(models)
    found = class_scores(comparison.shared.right, comparison.shared.labels, best=0)
    rows = read(comparison_text.class_metrics_csv(comparison, found))
    assert len(rows) == 6
    assert {row["class"] for row in rows} == {"cat, dog", 'qu"ote', "犬"}
    for row in rows:
        model = next(m for m in models if m.name == row["model"])
        number = names.index(row["class"])
        inside = labels == number
        num_right = int(model.right[inside].sum())
        interval = stats.binomtest(num_right, int(inside.sum())).proportion_ci(method="wilson")
        assert float(row["recall"]) == pytest.approx(num_right / inside.sum(), rel=1e-5)
        assert float(row["recall_low"]) == pytest.approx(interval.low, rel=1e-4)
        assert float(row["recall_high"]) == pytest.approx(interval.high, rel=1e-4)
        f1 = f1_score(labels, model.predicted, average=None, labels=[number])[0]
        assert float(row["f1"]) == pytest.approx(f1, rel=1e-5)
        assert (row["p"] == "") == (row["model"] == comparison.entries[0].name)


def test_label_suspects_begin_with_twins():
    labels = np.array([0, 1, 1, 0, 2, 2])
    predicted = np.array([0, 1, 0, 0, 2, 1])
    logs = log_softmax(12.0 * np.eye(3)[predicted])
    model = summarize(changed(fake_answers("a", labels, 3, rows=np.arange(6) * 10), log_probabilities=logs))
    calm = dataclasses.replace(
        model, tempered_label=np.exp(logs)[np.arange(6), labels], tempered_confidence=np.exp(logs.max(axis=1))
    )
    shared = compare([calm]).shared
    digests = [b"x", b"y", b"z", b"x", b"y", b"w"]
    assert twins_with_other_label(digests, labels) == [(1, 4), (4, 1)]
    found = find_suspects(shared, digests)
    assert [(one.row, one.label, one.suggested, one.twin) for one in found] == [
        (10, 1, 2, 40),
        (40, 2, 1, 10),
        (20, 1, 0, None),
        (50, 2, 1, None),
    ]
    assert [one.row for one in find_suspects(shared)] == [20, 50]
    rows = read(comparison_text.label_suspects_csv(found, ["x", "y", "z"], lambda row: f"{row}.png"))
    assert [(row["row"], row["file"], row["label"], row["suggested"]) for row in rows[:3]] == [
        ("10", "10.png", "y", "z"),
        ("40", "40.png", "z", "y"),
        ("20", "20.png", "y", "x"),
    ]
    assert rows[0]["reason"] == "same picture as row 40"
    assert rows[0]["suggested_probability"] == ""
    assert float(rows[2]["label_probability"]) < 0.01


# ---- Cost ----------------------------------------------------------------------------------------


class Watched(torch.nn.Module):
    """Notes the batches it is given, and whether it was in training mode."""

    def __init__(self, name: str, calls: list):
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, x):
        self.calls.append((self.name, len(x), x.shape[-1], self.training, torch.is_grad_enabled()))
        return x.mean()


def test_speed_is_measured_in_rounds_in_which_the_models_take_turns():
    calls = []
    models = [Watched("a", calls), Watched("b", calls).eval()]
    found = cost.measure_speed(models, [8, 16], device=torch.device("cpu"), round_seconds=0.002, num_rounds=3)
    assert [model.training for model in models] == [True, False]
    assert not any(training or grad for *_, training, grad in calls)
    turns = [
        call[:3]
        for call, before in zip(calls, [None, *calls], strict=False)
        if before is None or call[:3] != before[:3]
    ]
    assert turns == 3 * [("a", 64, 8), ("a", 1, 8), ("b", 64, 16), ("b", 1, 16)]
    for one in found:
        assert one.batch_ms > 0
        assert one.single_ms > 0
        assert one.spread >= 1


def test_speed_is_the_median_of_the_rounds(monkeypatch):
    times = iter([0.010, 0.5, 0.030, 0.7, 0.020, 0.6])
    monkeypatch.setattr(cost, "_seconds_of_image", lambda *arguments: next(times))
    (found,) = cost.measure_speed(
        [torch.nn.Identity()], [8], device=torch.device("cpu"), round_seconds=0.01, num_rounds=3
    )
    assert found == cost.Speed(
        batch_ms=pytest.approx(20), single_ms=pytest.approx(600), spread=pytest.approx(3)
    )
