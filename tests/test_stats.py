"""Each estimator of a comparison against its reference.

Scipy, scikit-learn, brute force, or a seeded simulation.
"""

import itertools
import warnings

import numpy as np
import pytest
from fake_models import log_softmax
from scipy import optimize, stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score

from modeling.stats import bootstrap, calibration, classes, proportions, runs, together

COUNTS = [
    (0, 0, 50),
    (3, 3, 44),
    (9, 3, 44),
    (1, 6, 50),
    (5, 0, 100),
    (0, 5, 100),
    (274, 162, 5000),
    (30, 25, 359),
]


# ---- One share, and the difference of two --------------------------------------------------------


@pytest.mark.parametrize(
    "num_right, num_images", [(0, 5), (1, 1), (0, 1), (359, 359), (340, 359), (4720, 5000)]
)
def test_wilson_is_scipys(num_right, num_images):
    expected = stats.binomtest(num_right, num_images).proportion_ci(method="wilson")
    assert proportions.wilson_interval(num_right, num_images)[1:] == pytest.approx(tuple(expected), abs=1e-12)


def test_wilson_reaches_0_and_1_exactly():
    assert proportions.wilson_interval(0, 7).low == 0.0
    assert proportions.wilson_interval(7, 7).high == 1.0


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (3, 3), (12, 4), (0, 7), (274, 162), (1, 0)])
def test_mcnemar_midp_is_the_exact_p_less_the_probability_of_the_observed(only_a, only_b):
    total, fewer = only_a + only_b, min(only_a, only_b)
    exact = stats.binomtest(only_a, total).pvalue if total else 1.0
    expected = exact - stats.binom.pmf(fewer, total, 0.5) if only_a != only_b else 1.0
    assert proportions.mcnemar_midp(only_a, only_b) == pytest.approx(expected, abs=1e-12)


def brute_score(delta, only_a, only_b, n):
    """The score statistic, with the likelihood maximised numerically over q = P(b right, a wrong)."""

    def minus_log_likelihood(q):
        # x log 0 is 0 where x is 0
        return -sum(
            count * np.log(max(p, 1e-300))
            for count, p in ((only_a, q + delta), (only_b, q), (n - only_a - only_b, 1 - 2 * q - delta))
        )

    low, high = max(0.0, -delta) + 1e-14, (1 - delta) / 2 - 1e-14
    q = optimize.minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-14}
    ).x
    return (only_a - only_b - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta)))


@pytest.mark.parametrize("only_a, only_b, n", COUNTS)
def test_tango_ends_where_the_numerically_maximised_likelihood_says(only_a, only_b, n):
    difference = (only_a - only_b) / n
    z = stats.norm.ppf(0.975)
    low = optimize.brentq(lambda d: brute_score(d, only_a, only_b, n) - z, -0.9, difference)
    high = optimize.brentq(lambda d: brute_score(d, only_a, only_b, n) + z, difference, 0.9)
    assert proportions.tango_interval(only_a, only_b, n) == pytest.approx((difference, low, high), abs=1e-6)


@pytest.mark.parametrize(
    "only_a, only_b, n", [*COUNTS, (1, 0, 1), (0, 1, 1), (7, 0, 7), (0, 0, 1), (3, 4, 7)]
)
def test_tango_flips_its_signs_when_the_models_are_swapped(only_a, only_b, n):
    value, low, high = proportions.tango_interval(only_a, only_b, n)
    assert -1 <= low <= value <= high <= 1
    assert low < high
    swapped = proportions.tango_interval(only_b, only_a, n)
    assert swapped == pytest.approx((-value, -high, -low), abs=1e-9)


def test_tango_without_disagreement_has_the_closed_form():
    z = stats.norm.ppf(0.975)
    assert proportions.tango_interval(0, 0, 200).high == pytest.approx(z**2 / (200 + z**2), abs=1e-9)


def test_holm_by_hand():
    assert proportions.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert proportions.holm([0.5, 0.9]).tolist() == pytest.approx([1.0, 1.0])
    assert proportions.holm([]).tolist() == []


def test_holm_is_its_definition():
    """H_(i) is rejected at level a exactly if p_(j) <= a / (m - j) for all j up to i: try all levels."""
    p = np.random.default_rng(0).random(8) ** 3
    order = np.argsort(p)
    for level in np.linspace(0.001, 0.999, 200):
        passed = p[order] <= level / (len(p) - np.arange(len(p)))
        rejected = np.zeros(len(p), bool)
        rejected[order] = np.cumprod(passed).astype(bool)
        assert (proportions.holm(p) <= level).tolist() == rejected.tolist()


def simulated_counts(rng, n, p_a, p_b, times):
    table = rng.multinomial(n, [p_a, p_b, 1 - p_a - p_b], size=times)
    return table[:, 0], table[:, 1]


def test_mcnemar_keeps_its_level():
    only_a, only_b = simulated_counts(np.random.default_rng(1), 1000, 0.05, 0.05, 500)
    assert (proportions.mcnemar_midp(only_a, only_b) < 0.05).mean() <= 0.08


def test_tango_covers_the_true_difference():
    counts = zip(*simulated_counts(np.random.default_rng(2), 400, 0.06, 0.03, 400), strict=True)
    intervals = [proportions.tango_interval(int(a), int(b), 400) for a, b in counts]
    assert 0.925 <= np.mean([one.low <= 0.03 <= one.high for one in intervals]) <= 0.985


def test_the_smallest_visible_difference_is_found_four_times_in_five():
    n, disagreement = 2000, 0.1
    difference = proportions.smallest_visible_difference(disagreement, n)
    assert difference == pytest.approx(2.8016 * np.sqrt(disagreement / n), rel=1e-4)
    p_a, p_b = (disagreement + difference) / 2, (disagreement - difference) / 2
    only_a, only_b = simulated_counts(np.random.default_rng(3), n, p_a, p_b, 2000)
    assert 0.77 <= (proportions.mcnemar_midp(only_a, only_b) < 0.05).mean() <= 0.83


# ---- Several runs of a recipe --------------------------------------------------------------------


def simulated_runs(rng, difficulty, num_runs, run_deviation):
    """(R, n) of 0 and 1.

    Runs of a recipe that is right on image i with probability difficulty[i], plus the run's.
    """
    shift = rng.normal(0, run_deviation, (num_runs, 1))
    return (rng.random((num_runs, len(difficulty))) < np.clip(difficulty + shift, 0, 1)).astype(bool)


def test_the_two_way_interval_covers_other_seeds_and_other_images():
    rng = np.random.default_rng(4)
    covered, covered_by_one_run = 0, 0
    for _ in range(100):
        shared = rng.beta(3, 0.35, 2000)
        a, b = (
            simulated_runs(rng, np.clip(shared + rng.normal(0, 0.15, 2000), 0.001, 0.999), 3, 0.01)
            for _ in range(2)
        )
        found = runs.paired_difference(a, b)
        covered += found.interval.low <= 0 <= found.interval.high
        assert (found.p < 0.05) == (not found.interval.low <= 0 <= found.interval.high)
        covered_by_one_run += runs.paired_difference(a[:1], b[:1]).p >= 0.05
    assert covered >= 92
    assert covered_by_one_run < 92, "this simulation would not show the fault that the two-way interval mends"


def test_the_interval_of_a_recipe_covers_its_true_accuracy():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(100):
        difficulty = rng.beta(3, 0.35, 1000)
        interval = runs.mean_of_runs(simulated_runs(rng, difficulty, 3, 0.005))
        covered += interval.low <= 3 / 3.35 <= interval.high
    assert covered >= 92


def test_the_two_way_variance_by_hand():
    a = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], bool)
    b = np.array([[0, 1, 0, 1], [0, 0, 0, 0]], bool)
    found = runs.paired_difference(a, b)
    d = np.array([1, 0, 0, 0.5])
    images = d.var(ddof=1) / 4
    run_a, run_b = np.var([0.75, 0.5], ddof=1) / 2, np.var([0.5, 0], ddof=1) / 2
    # the interaction: what is left when the run's and the image's means are taken away, over (2 - 1) (4 - 1)
    rest_a = np.array([[-0.125, 0.375, -0.125, -0.125], [0.125, -0.375, 0.125, 0.125]])
    rest_b = np.array([[-0.25, 0.25, -0.25, 0.25], [0.25, -0.25, 0.25, -0.25]])
    variance = run_a + run_b + images - (rest_a**2).sum() / 3 / 8 - (rest_b**2).sum() / 3 / 8
    variance = max(variance, images)
    df = variance**2 / (run_a**2 + run_b**2 + images**2 / 3)
    half = stats.t.ppf(0.975, df) * np.sqrt(variance)
    assert found.interval.value == pytest.approx(d.mean())
    assert found.interval.high == pytest.approx(min(1.0, d.mean() + half))
    assert found.p == pytest.approx(2 * stats.t.sf(d.mean() / np.sqrt(variance), df))
    # the mean over the four pairs of runs
    assert found.only_a == pytest.approx(np.mean([(x & ~y).sum() for x in a for y in b]))
    assert found.only_b == pytest.approx(np.mean([(y & ~x).sum() for x in a for y in b]))


def test_one_run_each_is_mcnemar_and_tango():
    rng = np.random.default_rng(6)
    a, b = rng.random((1, 500)) < 0.9, rng.random((1, 500)) < 0.8
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    found = runs.paired_difference(a, b)
    assert found.interval == proportions.tango_interval(only_a, only_b, 500)
    assert found.p == proportions.mcnemar_midp(only_a, only_b)
    assert runs.mean_of_runs(a) == proportions.wilson_interval(int(a.sum()), 500)


def test_swapping_recipes_flips_the_signs():
    rng = np.random.default_rng(7)
    a, b = rng.random((3, 300)) < 0.9, rng.random((2, 300)) < 0.85
    one, two = runs.paired_difference(a, b), runs.paired_difference(b, a)
    assert one.interval == pytest.approx((-two.interval.value, -two.interval.high, -two.interval.low))
    assert (one.p, one.only_a, one.only_b) == pytest.approx((two.p, two.only_b, two.only_a))


@pytest.mark.parametrize("num_images", [1, 2, 50])
@pytest.mark.parametrize("num_runs", [1, 2, 3])
def test_runs_that_are_all_right_or_all_wrong_have_an_interval_of_some_width(num_images, num_runs):
    right = np.ones((num_runs, num_images), bool)
    interval = runs.mean_of_runs(right)
    assert interval.high == 1
    assert interval.low < 1
    same = runs.paired_difference(right, right)
    assert (same.p, same.interval.value) == (1.0, 0.0)
    assert same.interval.low < 0 < same.interval.high
    opposite = runs.paired_difference(right, ~right)
    assert opposite.interval.value == 1
    assert opposite.p == pytest.approx(float(proportions.mcnemar_midp(num_images, 0)))


# ---- Bootstrap -----------------------------------------------------------------------------------


def test_the_bootstrap_of_means_is_close_to_scipys():
    rng = np.random.default_rng(8)
    values = np.stack([rng.exponential(size=800), rng.normal(size=800)], axis=1)
    low, high = bootstrap.interval_ends(bootstrap.resampled_means(values))
    for column in range(2):
        expected = stats.bootstrap(
            (values[:, column],), np.mean, n_resamples=4000, method="percentile", rng=1
        ).confidence_interval
        width = expected.high - expected.low
        assert low[column] == pytest.approx(expected.low, abs=0.08 * width)
        assert high[column] == pytest.approx(expected.high, abs=0.08 * width)


def test_the_bootstrap_gives_all_models_the_same_images():
    values = np.random.default_rng(9).random((300, 1))
    resampled = bootstrap.resampled_means(np.concatenate([values, values, 2 * values], axis=1))
    assert np.array_equal(resampled[:, 0], resampled[:, 1])
    assert np.allclose(resampled[:, 2], 2 * resampled[:, 0])
    assert np.array_equal(
        resampled, bootstrap.resampled_means(np.concatenate([values, values, 2 * values], axis=1))
    )
    paired = stats.bootstrap(
        (values[:, 0], values[:, 0] ** 2),
        lambda x, y, axis: (x - y).mean(axis=axis),
        n_resamples=4000,
        method="percentile",
        paired=True,
        rng=2,
    ).confidence_interval
    both = bootstrap.resampled_means(np.concatenate([values, values**2], axis=1))
    low, high = bootstrap.interval_ends(both[:, 0] - both[:, 1])
    width = paired.high - paired.low
    assert (low, high) == pytest.approx(tuple(paired), abs=0.08 * width)


def test_resampled_class_scores_are_a_loop_over_scikit_learns(monkeypatch):
    monkeypatch.setattr(bootstrap, "NUM_RESAMPLES", 20)
    rng = np.random.default_rng(10)
    # class 4 has no image but is predicted, class 5 is neither, class 0 has one image
    labels = np.concatenate([[0], rng.integers(1, 4, 60)])
    predicted = np.stack(
        [np.where(rng.random(61) < skill, labels, rng.integers(0, 5, 61)) for skill in (0.8, 0.4)]
    )
    macro_f1, balanced = bootstrap.resampled_class_scores(labels, predicted, 6)
    counts = np.bincount(labels, minlength=6)
    for number, weights in enumerate(bootstrap._weights_within_classes(labels, counts)):
        images = np.repeat(np.arange(61), weights.astype(int))
        assert np.bincount(labels[images], minlength=6).tolist() == counts.tolist()
        for k in range(2):
            expected = f1_score(labels[images], predicted[k][images], average="macro", zero_division=0)
            assert macro_f1[number, k] == pytest.approx(expected)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about class 4, which has no image
                expected = balanced_accuracy_score(labels[images], predicted[k][images])
            assert balanced[number, k] == pytest.approx(expected)


# ---- Calibration ---------------------------------------------------------------------------------


def random_confidence(n, seed=11):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.3, 1, n)
    return confidence, rng.random(n) < confidence**1.5


def test_the_calibration_error_is_scikit_learns_curve_weighted():
    confidence, right = random_confidence(1500)
    share, mean = calibration_curve(right, confidence, n_bins=15, strategy="quantile")
    assert calibration.calibration_error(confidence, right) == pytest.approx(np.abs(share - mean).mean())


def test_the_calibration_error_does_not_depend_on_the_order_of_images_of_different_confidence():
    confidence, right = random_confidence(500)
    shuffled = np.random.default_rng(0).permutation(500)
    again = calibration.calibration_error(confidence[shuffled], right[shuffled])
    assert again == pytest.approx(calibration.calibration_error(confidence, right), abs=1e-12)


@pytest.mark.parametrize("n", [1, 7, 14, 15, 16])
def test_the_calibration_error_of_few_images_has_at_most_a_bin_an_image(n):
    confidence, right = random_confidence(n)
    expected = np.abs(right - confidence).mean()
    found = calibration.calibration_error(confidence, right)
    assert found == pytest.approx(expected) if n <= 15 else found <= expected + 1e-12


def test_an_honest_model_is_found_honest_about_19_times_in_20():
    rng = np.random.default_rng(12)
    confidence = np.clip(rng.beta(5, 1, 600), 0.1, 1)
    mean, limit = calibration.honest_calibration_error(confidence)
    errors = [calibration.calibration_error(confidence, rng.random(600) < confidence) for _ in range(400)]
    assert np.mean(errors) == pytest.approx(mean, rel=0.05)
    assert 0.91 <= np.mean(np.array(errors) <= limit) <= 0.99
    assert calibration.honest_calibration_error(confidence) == (mean, limit)


def test_reliability_bins_by_hand():
    confidence = np.concatenate(
        [np.full(10, 0.15), np.full(25, 0.25), np.full(40, 0.55), np.full(5, 0.95), [1.0]]
    )
    right = np.arange(81) % 2 == 0
    bins = calibration.reliability_bins(confidence, right)
    assert [one.num_images for one in bins] == [35, 46], "10 + 25; 40, and the 6 at the top that are too few"
    for one, part in zip(bins, (slice(0, 35), slice(35, 81)), strict=True):
        expected = stats.binomtest(int(right[part].sum()), one.num_images).proportion_ci(method="wilson")
        assert one[:4] == pytest.approx((confidence[part].mean(), right[part].mean(), *expected))
    assert [one.num_images for one in calibration.reliability_bins(confidence[:3], right[:3])] == [3]


def brute_errors(confidence, right):
    """Mean errors among the k surest images, over all orders of images of equal confidence."""
    totals = np.zeros(len(right))
    orders = [
        order
        for order in itertools.permutations(range(len(right)))
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order))
    ]
    for order in orders:
        totals += np.cumsum(~right[list(order)])
    return totals / len(orders)


def test_errors_of_the_surest_share_ties():
    rng = np.random.default_rng(13)
    for _ in range(10):
        confidence, right = rng.choice([0.5, 0.7, 0.9], 7), rng.random(7) < 0.5
        found = calibration.errors_of_surest(confidence, right)
        assert found.tolist() == pytest.approx(brute_errors(confidence, right).tolist())
    errors = calibration.errors_of_surest(
        np.array([0.9, 0.9, 0.8, 0.5]), np.array([True, False, True, False])
    )
    assert errors.tolist() == [0.5, 1, 1, 2]
    assert calibration.error_at_coverage(errors, 1.0) == 0.5
    assert calibration.error_at_coverage(errors, 0.5) == 0.5
    assert calibration.error_at_coverage(errors, 0.01) == 0.5


def random_logs(n=400, num_classes=5, sharpness=3.0, seed=14):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 1
    return log_softmax(sharpness * logits), labels


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 3.0, 15.0])
def test_the_temperature_is_the_best_of_a_grid(sharpness):
    logs, labels = random_logs(sharpness=sharpness)
    temperature = calibration.fit_temperature(logs, labels)
    best = calibration.tempered_losses(logs, labels, temperature).mean()
    grid = np.exp(np.linspace(-3, 3, 601))
    losses = [calibration.tempered_losses(logs, labels, t).mean() for t in grid]
    assert best <= min(losses) + 1e-12
    assert temperature == pytest.approx(grid[int(np.argmin(losses))], rel=0.011)
    assert calibration.fit_temperature(logs, labels, start=7.0) == pytest.approx(temperature, rel=1e-5)


def test_the_temperature_stays_within_its_bounds_where_the_loss_has_no_minimum():
    logs = log_softmax(np.array([[3.0, 0.0], [0.0, 2.0]]))
    assert calibration.fit_temperature(logs, np.array([0, 1])) == pytest.approx(np.exp(-3), rel=1e-3)
    assert calibration.fit_temperature(logs, np.array([1, 0])) == pytest.approx(np.exp(3), rel=1e-3)
    assert 0.04 < calibration.fit_temperature(log_softmax(np.zeros((4, 3))), np.zeros(4, int)) < 21


def test_tempered_losses_are_those_of_the_divided_logits_and_leave_the_answers_alone():
    logs, labels = random_logs()
    scaled = log_softmax(logs.astype(float) / 2.5)
    expected = -scaled[np.arange(len(labels)), labels]
    assert np.allclose(calibration.tempered_losses(logs, labels, 2.5), expected, atol=1e-5)
    assert np.array_equal(scaled.argmax(1), logs.argmax(1))


def test_fitted_losses_never_use_an_images_own_fold():
    logs, labels = random_logs()
    rows = np.arange(len(labels)) * 3
    fold = calibration.folds(rows)
    assert set(fold.tolist()) == {0, 1, 2, 3, 4}
    assert np.bincount(fold).min() > 50
    losses = calibration.cross_fitted_losses(logs, labels, rows, 1.0)
    for number in range(5):
        inside = fold == number
        fitted = calibration.fit_temperature(logs[~inside], labels[~inside])
        expected = calibration.tempered_losses(logs[inside], labels[inside], fitted)
        assert losses[inside] == pytest.approx(expected, abs=1e-6)
    assert calibration.cross_fitted_losses(logs[:1], labels[:1], rows[:1], 1.0).shape == (1,)


# ---- Classes -------------------------------------------------------------------------------------


def test_class_winners_are_mcnemar_with_benjamini_and_hochberg():
    rng = np.random.default_rng(15)
    labels = rng.choice([0, 1, 2, 5], 900)
    best = rng.random((1, 900)) < np.where(labels == 5, 0.5, 0.95)
    other = rng.random((1, 900)) < 0.8
    scores = classes.class_scores([other, best], labels, best=1)
    assert scores.classes.tolist() == [0, 1, 2, 5]
    assert scores.num_images.tolist() == [int((labels == c).sum()) for c in (0, 1, 2, 5)]
    p = []
    for j, number in enumerate(scores.classes):
        inside = labels == number
        assert scores.recall[0, j] == pytest.approx(other[0, inside].mean())
        only_other, only_best = (other & ~best)[0, inside].sum(), (best & ~other)[0, inside].sum()
        p.append(float(proportions.mcnemar_midp(only_other, only_best)))
    assert scores.p[0].tolist() == pytest.approx(p)
    assert np.isnan(scores.p[1]).all()
    assert scores.corrected_p[0].tolist() == pytest.approx(stats.false_discovery_control(p).tolist())
    assert scores.is_better.tolist() == [[False, False, False, True], [False] * 4]


def test_class_winners_of_several_runs_come_from_the_two_way_test():
    rng = np.random.default_rng(16)
    labels = rng.integers(0, 3, 300)
    a, b = rng.random((3, 300)) < 0.9, rng.random((2, 300)) < 0.7
    scores = classes.class_scores([a, b], labels, best=0)
    for j in range(3):
        inside = labels == j
        assert scores.recall[1, j] == pytest.approx(b[:, inside].mean())
        assert scores.p[1, j] == pytest.approx(runs.paired_difference(b[:, inside], a[:, inside]).p)


def test_one_model_has_no_class_tests():
    scores = classes.class_scores([np.array([[True, False]])], np.array([1, 1]), best=0)
    assert scores.recall.tolist() == [[0.5]]
    assert not scores.is_better.any()


def test_scores_of_a_confusion_matrix_are_scikit_learns():
    rng = np.random.default_rng(17)
    labels, predicted = rng.integers(0, 4, 100), rng.integers(0, 5, 100)
    matrix = classes.confusion_matrix(labels, predicted, 6)
    assert matrix.sum() == 100
    assert matrix[2, 3] == ((labels == 2) & (predicted == 3)).sum()
    f1 = f1_score(labels, predicted, average=None, labels=range(5), zero_division=0)
    assert classes.f1_scores(matrix)[:5].tolist() == pytest.approx(f1.tolist())
    assert np.isnan(classes.f1_scores(matrix)[5])
    assert np.isnan(classes.precisions(matrix)[5])
    assert classes.precisions(matrix)[4] == 0


def test_classes_that_are_confused_stand_side_by_side():
    matrix = np.diag([50, 50, 50, 50, 50, 50])
    for a, b in ((0, 3), (1, 5), (2, 4)):
        matrix[a, b] = matrix[b, a] = 20
    order = classes.similar_side_by_side(matrix).tolist()
    assert sorted(order) == [0, 1, 2, 3, 4, 5]
    assert all(abs(order.index(a) - order.index(b)) == 1 for a, b in ((0, 3), (1, 5), (2, 4)))
    assert classes.similar_side_by_side(np.eye(5)).tolist() == [0, 1, 2, 3, 4]
    assert classes.similar_side_by_side(np.ones((2, 2))).tolist() == [0, 1]
    assert classes.similar_side_by_side(np.zeros((4, 4))).tolist() == [0, 1, 2, 3]


# ---- Together ------------------------------------------------------------------------------------


def test_averages_are_those_of_numpy():
    rng = np.random.default_rng(18)
    labels = rng.integers(0, 4, 200)
    probabilities = [rng.dirichlet(np.ones(4), 200).astype(np.float32) for _ in range(3)]
    subsets = [(0, 1, 2), (0, 2), (1,)]
    right = together.right_of_averages(probabilities, labels, subsets)
    for row, subset in zip(right, subsets, strict=True):
        mean = np.mean([probabilities[k].astype(float) for k in subset], axis=0)
        assert np.array_equal(row, mean.argmax(1) == labels)


def test_candidate_subsets_are_pairs_and_all_but_one():
    assert together.candidate_subsets(2) == [(0, 1)]
    assert together.candidate_subsets(3) == [(0, 1), (0, 2), (1, 2)]
    assert together.candidate_subsets(4) == [
        *itertools.combinations(range(4), 2),
        (1, 2, 3),
        (0, 2, 3),
        (0, 1, 3),
        (0, 1, 2),
    ]


def test_error_consistency_is_cohens_kappa():
    rng = np.random.default_rng(19)
    shared = rng.random(400) < 0.7
    right = np.stack([shared ^ (rng.random(400) < 0.15) for _ in range(3)])
    found = together.error_consistency(right)
    assert set(found) == {(0, 1), (0, 2), (1, 2)}
    for (a, b), interval in found.items():
        assert interval.value == pytest.approx(cohen_kappa_score(right[a], right[b]))
        expected = stats.bootstrap(
            (right[a], right[b]),
            cohen_kappa_score,
            paired=True,
            vectorized=False,
            n_resamples=300,
            method="percentile",
            rng=3,
        ).confidence_interval
        assert interval[1:] == pytest.approx(tuple(expected), abs=0.03)


def test_kappa_of_models_that_are_always_right_is_not_defined():
    interval = together.error_consistency(np.ones((2, 20), bool))[0, 1]
    assert all(np.isnan(interval))


def planted_errors(seed=20, n=3000, num_classes=10, num_planted=50):
    """Probabilities of three good models, and labels of which some were made wrong."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes, n)
    logits = rng.normal(size=(3, n, num_classes))
    logits[:, np.arange(n), truth] += 5
    labels = truth.copy()
    planted = rng.choice(n, num_planted, replace=False)
    labels[planted] = (truth[planted] + rng.integers(1, num_classes, num_planted)) % num_classes
    logs = log_softmax(2 * logits)
    temperatures = [calibration.fit_temperature(one, labels) for one in logs]
    label_probability = np.stack(
        [
            np.exp(-calibration.tempered_losses(one, labels, t))
            for one, t in zip(logs, temperatures, strict=True)
        ]
    )
    return labels, logs.argmax(2), label_probability, planted


def test_planted_label_errors_are_found_in_the_order_of_the_labels_probability():
    labels, predicted, label_probability, planted = planted_errors()
    found = together.suspect_labels(labels, predicted, label_probability)
    hits = np.isin(found, planted)
    assert hits.mean() > 0.9, "precision"
    assert hits.sum() > 0.6 * len(planted), "recall"
    mean = label_probability.mean(axis=0)[found]
    assert (np.diff(mean) >= 0).all()
    assert mean.max() < 0.01
    assert (predicted[:, found] == predicted[0, found]).all()


def test_a_label_that_one_model_believes_is_not_suspect():
    labels, predicted = np.array([0, 0, 0]), np.array([[1, 1, 1], [1, 0, 2]])
    tiny = np.full((2, 3), 1e-6)
    assert together.suspect_labels(labels, predicted, tiny).tolist() == [0]
    assert together.suspect_labels(labels, predicted, np.full((2, 3), 0.02)).tolist() == []
