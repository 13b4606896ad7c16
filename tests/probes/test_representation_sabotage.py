"""Planted faults in probes and steering, each of which must turn one of their tests red."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.probes import _linear_fit, _read_texts, _steered, linear_probe, residual_map
from tests.probes import test_linear_fit as fit_tests
from tests.probes import test_linear_probe as probe_tests
from tests.probes import test_residual_map as map_tests
from tests.probes import test_steering as steering_tests


def test_one_vector_for_all_rows(monkeypatch):
    right = _steered.add_vectors
    wrong = lambda loaded, vectors, layer: right(loaded, vectors[:1].expand_as(vectors), layer=layer)
    monkeypatch.setattr(steering_tests, "add_vectors", wrong)
    with pytest.raises(AssertionError):
        steering_tests.test_each_row_gets_its_own_vector_and_zero_gets_nothing("llama", 1)


def test_a_vector_added_one_layer_late(monkeypatch):
    right = _steered.add_vectors
    wrong = lambda loaded, vectors, layer: right(loaded, vectors, layer=layer + 1)
    monkeypatch.setattr(steering_tests, "add_vectors", wrong)
    with pytest.raises(AssertionError):
        steering_tests.test_each_row_gets_its_own_vector_and_zero_gets_nothing("llama", 1)


def test_a_direction_removed_without_unit_length(monkeypatch):
    right = _steered.remove_directions
    wrong = lambda loaded, units: right(loaded, 0.9 * units)
    monkeypatch.setattr(steering_tests, "remove_directions", wrong)
    with pytest.raises(AssertionError):
        steering_tests.test_a_removed_direction_is_nowhere_in_the_stream("llama")


def test_a_direction_removed_from_the_embedding_only(monkeypatch):
    monkeypatch.setattr(_steered, "intervene", _first_only(_steered.intervene))
    with pytest.raises(AssertionError):
        steering_tests.test_a_removed_direction_is_nowhere_in_the_stream("llama")


def _first_only(right):
    def wrong(model, paths, change, *, inputs=False):
        return right(model, paths, change if inputs else lambda path, written: written, inputs=inputs)

    return wrong


def test_positives_and_negatives_swapped(monkeypatch):
    swapped = {"positives": steering_tests.LISTS["negatives"], "negatives": steering_tests.LISTS["positives"]}
    right = steering_tests.mean_difference
    monkeypatch.setattr(
        steering_tests, "mean_difference", lambda loaded, **given: right(loaded, **{**given, **swapped})
    )
    with pytest.raises(AssertionError):
        steering_tests.test_the_direction_is_the_difference_of_the_means()


def test_a_group_in_training_and_in_test(monkeypatch, tmp_path: Path):
    """The leak that makes a probe look clever: what it learned by heart is called knowledge."""
    monkeypatch.setattr(linear_probe, "unseen_groups", _linear_fit.seen_groups)
    with pytest.raises(AssertionError):
        probe_tests.test_groups_can_be_learned_by_heart_only_where_they_are_met(tmp_path)


def test_a_probe_tested_on_what_it_was_trained_on(monkeypatch):
    def wrong(x_ND, y_TN, fold_N, **options):
        fitted = _linear_fit.fit(x_ND, y_TN, **options)
        return fitted.scores(x_ND).argmax(-1).numpy(), fitted.gradient

    monkeypatch.setattr(fit_tests, "out_of_fold", wrong)
    with pytest.raises(AssertionError):
        fit_tests.test_labels_of_a_direction_are_read_and_shuffled_ones_are_not("logistic")


def test_a_penalty_left_out(monkeypatch):
    right = _linear_fit.fit
    wrong = lambda x_ND, y_TN, *, l2, **given: right(x_ND, y_TN, l2=l2 / 10, **given)
    monkeypatch.setattr(fit_tests, "fit", wrong)
    with pytest.raises(AssertionError):
        fit_tests.test_no_step_from_the_solution_lowers_the_loss("logistic", 2, 12)


def test_a_padding_position_read_for_the_last(monkeypatch):
    right = _read_texts._weights
    wrong = lambda encoded, position, *, causal: right(encoded, position, causal=causal).roll(1)
    monkeypatch.setattr(_read_texts, "_weights", wrong)
    with pytest.raises(AssertionError):
        probe_tests.test_texts_in_batches_are_texts_alone("llama", "last")


def test_components_with_the_solvers_own_signs(monkeypatch):
    right = residual_map.principal_components

    def wrong(rows):
        parts = right(rows)
        parts.directions_KD = parts.directions_KD * torch.where(rows[0, 0] > 0, 1.0, -1.0)
        return parts

    monkeypatch.setattr(map_tests, "principal_components", wrong)
    with pytest.raises(AssertionError):
        map_tests.test_signs_do_not_depend_on_the_solver()
