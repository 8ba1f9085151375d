"""Our numbers against scikit-learn's own."""

import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as reference

import evaluate
from modeling import metrics
from modeling.engine import Predictions


def random_predictions(num_classes, n=300, true_classes=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, true_classes or num_classes, (n,), generator=g)
    logits = torch.randn(n, num_classes, generator=g) + 1.5 * torch.nn.functional.one_hot(labels, num_classes)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return Predictions(torch.arange(n), labels, logits.argmax(1), logits, losses)


@pytest.mark.parametrize("num_classes, true_classes", [(10, 10), (10, 6), (120, 100), (7, 7)])
def test_metrics_are_scikit_learns(num_classes, true_classes):
    p = random_predictions(num_classes, true_classes=true_classes)
    ours = metrics.compute(p)
    true, predicted = p.labels.numpy(), p.predicted.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "loss": p.losses.double().mean().item(),
            "accuracy": reference.accuracy_score(true, predicted),
            "balanced_accuracy": reference.balanced_accuracy_score(true, predicted),
            "top5_accuracy": reference.top_k_accuracy_score(
                true, p.probabilities.numpy(), k=5, labels=np.arange(num_classes)
            ),
            "macro_f1": reference.f1_score(true, predicted, average="macro"),
            "weighted_f1": reference.f1_score(true, predicted, average="weighted"),
        }
    assert tuple(ours) == metrics.NAMES
    assert ours == pytest.approx(expected, abs=1e-12)


def test_ranks_of_tied_classes_are_scikit_learns():
    g = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randint(0, 4, (500, 12), generator=g).float(),
        torch.randint(0, 12, (500,), generator=g),
    )
    ranks = metrics.true_ranks(logits, labels)
    for k in (1, 3, 5, 11):
        expected = reference.top_k_accuracy_score(labels, logits.numpy(), k=k, labels=np.arange(12))
        assert (ranks < k).double().mean().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_top5_of_few_classes_is_one(num_classes):
    assert metrics.compute(random_predictions(num_classes))["top5_accuracy"] == 1.0


def test_a_second_computation_does_not_remember_the_first():
    metrics.compute(random_predictions(10))
    again = metrics.compute(random_predictions(10, n=50, seed=3))
    p = random_predictions(10, n=50, seed=3)
    assert again["accuracy"] == pytest.approx((p.labels == p.predicted).double().mean().item())


def test_one_image():
    assert metrics.compute(random_predictions(10, n=1))["accuracy"] in (0.0, 1.0)


def test_mcnemar_is_an_evaluate_comparison_with_the_midp_of_scipys_exact_test():
    rng = np.random.default_rng(0)
    references = rng.integers(0, 5, 400)
    one, two = (np.where(rng.random(400) < skill, references, (references + 1) % 5) for skill in (0.9, 0.8))
    comparison = metrics.McNemar()
    assert isinstance(comparison, evaluate.Comparison)
    found = comparison.compute(predictions1=one, predictions2=two, references=references)
    only1 = int(((one == references) & (two != references)).sum())
    only2 = int(((two == references) & (one != references)).sum())
    exact = stats.binomtest(only1, only1 + only2).pvalue
    midp = exact - stats.binom.pmf(only1, only1 + only2, 0.5)
    assert (found["only1"], found["only2"]) == (only1, only2)
    assert found["p"] == pytest.approx(midp)
    assert found["difference"] == pytest.approx((one == references).mean() - (two == references).mean())
    swapped = comparison.compute(predictions1=two, predictions2=one, references=references)
    assert swapped["p"] == found["p"]
    assert swapped["difference"] == -found["difference"]
