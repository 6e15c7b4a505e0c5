"""Trained estimators on windows: what they begin as, what they learn, and what they refuse."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from favor_np import nn
from favor_np.interop.sklearn import PerformerClassifier, PerformerRegressor

QUICK = {"dim": 16, "num_features": 16, "epochs": 25, "rate": 0.01}


def windows(rows=900, seed=0):
    """Windows, and the largest of their last steps: what no linear map finds."""
    X = np.random.default_rng(seed).standard_normal((rows, 8))
    return X, np.abs(X[:, -4:]).max(1)


def test_regression_learns_what_no_line_is():
    X, y = windows()
    model = PerformerRegressor(**QUICK).fit(X[:700], y[:700])
    linear = Ridge().fit(X[:700], y[:700])
    assert model.score(X[700:], y[700:]) > linear.score(X[700:], y[700:]) + 0.2
    assert model.n_iter_ == len(model.loss_curve_) == len(model.validation_scores_) - 1
    assert model.best_loss_ == min(model.validation_scores_) < model.validation_scores_[0]


def test_classification_learns_what_no_line_parts():
    X, y = windows()
    labels = np.where(y > 1.5, "wild", "calm")
    model = PerformerClassifier(**QUICK).fit(X[:700], labels[:700])
    linear = LogisticRegression().fit(X[:700], labels[:700])
    assert model.score(X[700:], labels[700:]) > linear.score(X[700:], labels[700:]) + 0.1
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1)


def test_without_training_they_are_linear():
    X, y = windows()
    outputs = np.stack([y, X @ np.arange(8.0) + 3], axis=1)
    found = PerformerRegressor(epochs=0).fit(X, outputs).predict(X)
    expected = make_pipeline(StandardScaler(), Ridge(1e-3 * len(X))).fit(X, outputs).predict(X)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    labels = np.digitize(X[:, 0], [-0.5, 0.5])
    for classes in (labels, labels > 0):
        found = PerformerClassifier(epochs=0).fit(X, classes).predict_proba(X)
        linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        expected = linear.fit(X, classes).predict_proba(X)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_numbers_whose_squares_are_beyond_float64(size):
    X, y = windows(100)
    plain = PerformerRegressor(epochs=0).fit(X, y).predict(X)
    np.testing.assert_allclose(
        PerformerRegressor(epochs=0).fit(size * X, y).predict(size * X), plain
    )
    found = PerformerRegressor(epochs=0).fit(X, size * y).predict(X)
    np.testing.assert_allclose(found, size * plain)
    labels = y > 1
    plain = PerformerClassifier(epochs=0).fit(X, labels).predict_proba(X)
    found = PerformerClassifier(epochs=0).fit(size * X, labels).predict_proba(size * X)
    np.testing.assert_allclose(found, plain, rtol=1e-4)


def test_what_is_no_better_is_left_out():
    X, _ = windows(300)
    y = X @ np.arange(8.0)
    model = PerformerRegressor(**QUICK | {"epochs": 2, "rate": 1e-6}).fit(X, y)
    noise = np.random.default_rng(1).standard_normal(300)
    other = PerformerRegressor(**QUICK | {"epochs": 2, "rate": 0.3}).fit(X, noise)
    for found, values in ((model, y), (other, noise)):
        start = PerformerRegressor(epochs=0).fit(X, values).predict(X)
        np.testing.assert_allclose(found.predict(X), start, atol=1e-3 * np.abs(values).max())


def test_rows_are_steps_of_channels():
    X, y = windows()
    flat = PerformerRegressor(4, **QUICK | {"epochs": 1}).fit(X, y)
    head = flat.model_.layers[1].body.layers[0]
    assert head == nn.Linear(4, 16)
    with pytest.raises(ValueError, match="must be a multiple of channels = 3, got 8"):
        PerformerRegressor(3).fit(X, y)


def test_the_same_seed_is_the_same_model():
    X, y = windows(200)
    first, again, other = (
        PerformerRegressor(**QUICK, random_state=seed).fit(X, y).predict(X) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_pipelines_searches_and_pickles():
    X, y = windows(300)
    model = make_pipeline(StandardScaler(), PerformerRegressor(**QUICK | {"epochs": 2}))
    grid = {"performerregressor__dim": [4, 8]}
    found = GridSearchCV(model, grid, cv=TimeSeriesSplit(2, gap=5)).fit(X, y)
    best = found.best_estimator_
    assert np.array_equal(pickle.loads(pickle.dumps(best)).predict(X), best.predict(X))
    assert clone(best[-1]).get_params() == best[-1].get_params()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs must be"),
        ({"rate": 0.0}, "rate must be"),
        ({"validation": 1.0}, "validation must be between 0 and 1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"dim": 6}, "dim must be a multiple of heads"),
    ],
)
def test_bad_parameters_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PerformerRegressor(**settings).fit(*windows(60))
    with pytest.raises(ValueError, match="at least two classes"):
        PerformerClassifier().fit(np.ones((40, 2)), np.ones(40))
