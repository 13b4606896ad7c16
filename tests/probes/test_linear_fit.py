"""Linear classifiers: equal to obvious references, right on separable labels, at chance on shuffled ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from core.probes._linear_fit import fit, one_thread, out_of_fold, seen_groups, unseen_groups

N, D = 60, 12


def data(n=N, d=D, *, classes=2, seed=0):
    generator = np.random.default_rng(seed)
    x_ND = torch.from_numpy(generator.normal(size=(n, d)) * np.linspace(0.1, 30, d) + 5)
    return x_ND, generator.integers(0, classes, n), generator


def slow_loss(x_ND, y_N, weight_DC, bias_C, *, l2, classifier):
    """The loss as it is written, text by text."""
    scale = x_ND.std(0, correction=0)
    total = l2 / 2 * float(((weight_DC * scale[:, None]) ** 2).sum())
    for x_D, y in zip(x_ND, y_N, strict=True):
        scores = [float(x_D @ weight_DC[:, c] + bias_C[c]) for c in range(len(bias_C))]
        if classifier == "logistic":
            total += math.log(sum(map(math.exp, scores))) - scores[y]
        else:
            total += sum((s - (c == y)) ** 2 for c, s in enumerate(scores)) / 2
    return total / len(y_N)


@pytest.mark.parametrize("d", [12, 90])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("classifier", ["logistic", "ridge"])
def test_no_step_from_the_solution_lowers_the_loss(classifier, classes, d):
    """Also with more features than texts, where the fit runs in their span."""
    x_ND, y_N, generator = data(d=d, classes=classes)
    found = fit(x_ND, y_N[None], n_classes=classes, classifier=classifier, l2=2.0)
    weight, bias = found.weight_TDC[0], found.bias_TC[0]
    best = slow_loss(x_ND, y_N, weight, bias, l2=2.0, classifier=classifier)
    assert found.gradient < 1e-6
    for factor in (0.99, 1.01):  # a penalty too weak or too strong shows here first
        kept = bias + (1 - factor) * x_ND.mean(0) @ weight  # so that the scores' centre stays
        assert slow_loss(x_ND, y_N, factor * weight, kept, l2=2.0, classifier=classifier) > best - 1e-12
    scale = x_ND.std(0, correction=0)[:, None]
    for size in (1e-1, 1e-3):
        for _ in range(5):
            step = torch.from_numpy(generator.normal(size=weight.shape)) * size / scale
            other = slow_loss(x_ND, y_N, weight + step, bias, l2=2.0, classifier=classifier)
            assert other > best - 1e-10
            shift = torch.from_numpy(generator.normal(size=bias.shape)) * size
            assert slow_loss(x_ND, y_N, weight, bias + shift, l2=2.0, classifier=classifier) > best - 1e-10


def test_the_solution_is_the_one_scikit_learn_finds():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x_ND, y_N, _ = data(classes=3)
    ours = fit(x_ND, y_N[None], n_classes=3, classifier="logistic", l2=1.0).scores(x_ND)[0].softmax(-1)
    z_ND = ((x_ND - x_ND.mean(0)) / x_ND.std(0, correction=0)).numpy()
    theirs = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(z_ND, y_N)
    assert ours.numpy() == pytest.approx(theirs.predict_proba(z_ND), abs=1e-5)


@pytest.mark.parametrize("d", [12, 90])
def test_ridge_is_the_normal_equations(d):
    x_ND, y_N, _ = data(d=d)
    ours = fit(x_ND, y_N[None], n_classes=2, classifier="ridge", l2=3.0).scores(x_ND)[0]
    z_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0, correction=0)
    onehot = torch.eye(2, dtype=torch.float64)[torch.from_numpy(y_N)]
    weight = torch.linalg.solve(
        z_ND.T @ z_ND + 3.0 * torch.eye(d, dtype=torch.float64), z_ND.T @ (onehot - onehot.mean(0))
    )
    assert ours.numpy() == pytest.approx((z_ND @ weight + onehot.mean(0)).numpy(), abs=1e-10)


def test_targets_fitted_together_are_those_fitted_alone():
    x_ND, y_N, generator = data()
    other_N = generator.integers(0, 2, N)
    both = fit(x_ND, np.stack([y_N, other_N]), n_classes=2, classifier="logistic", l2=1.0)
    for index, target in enumerate((y_N, other_N)):
        alone = fit(x_ND, target[None], n_classes=2, classifier="logistic", l2=1.0)
        assert both.scores(x_ND)[index].numpy() == pytest.approx(alone.scores(x_ND)[0].numpy(), abs=1e-4)


@pytest.mark.parametrize("classifier", ["logistic", "ridge"])
def test_labels_of_a_direction_are_read_and_shuffled_ones_are_not(classifier):
    """Identity 16: labels sign(w · h) give accuracy 1, shuffled ones chance ± 3 σ."""
    generator = np.random.default_rng(1)
    x_ND = torch.from_numpy(generator.normal(size=(400, 64)))
    x_ND[:, 0] += torch.where(x_ND[:, 0] > 0, 8.0, -8.0)
    y_N = (x_ND[:, 0] > 0).long().numpy()
    groups = [str(row % 40) for row in range(400)]
    fold_N = unseen_groups(groups, y_N, folds=5, generator=generator)
    shuffled_N = generator.permutation(y_N)
    found, _ = out_of_fold(
        x_ND, np.stack([y_N, shuffled_N]), fold_N, n_classes=2, classifier=classifier, l2=0.01
    )
    assert (found[0] == y_N).all()
    assert abs((found[1] == shuffled_N).mean() - 0.5) < 3 * 0.5 / math.sqrt(400)


def test_a_feature_that_never_changes_is_no_division_by_zero():
    x_ND, y_N, _ = data()
    x_ND[:, 3] = 7.0
    found = fit(x_ND, y_N[None], n_classes=2, classifier="logistic", l2=1.0)
    assert torch.isfinite(found.weight_TDC).all()
    assert float(found.weight_TDC[0, 3].abs().max()) < 1e-9


GROUPS = [f"g{index}" for index in range(13) for _ in range(3 + index % 3)]
LABELS = np.array([index % 2 for index in range(len(GROUPS))])


def test_unseen_groups_are_whole_and_every_fold_has_text():
    fold_N = unseen_groups(GROUPS, LABELS, folds=4, generator=np.random.default_rng(0))
    for group in set(GROUPS):
        assert len({fold for g, fold in zip(GROUPS, fold_N, strict=True) if g == group}) == 1
    sizes = np.bincount(fold_N, minlength=4)
    assert sizes.min() > 0
    assert sizes.max() - sizes.min() <= 5


def test_groups_of_one_label_are_spread_so_that_every_fold_has_every_label():
    groups = [f"word {index}" for index in range(20) for _ in range(3)]
    labels = np.array([index % 2 for index in range(20) for _ in range(3)])
    fold_N = unseen_groups(groups, labels, folds=5, generator=np.random.default_rng(3))
    for fold in range(5):
        assert np.bincount(labels[fold_N == fold]).tolist() == [6, 6]


def test_seen_groups_are_met_in_training_by_every_text_tested():
    fold_N = seen_groups(GROUPS, LABELS, folds=4, generator=np.random.default_rng(0))
    for row, (group, fold) in enumerate(zip(GROUPS, fold_N, strict=True)):
        assert any(g == group and f != fold for g, f in zip(GROUPS, fold_N, strict=True)), row


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
