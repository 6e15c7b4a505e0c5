"""Estimators of scikit-learn: its own checks, attention by definition, parts and merges, pipelines."""

import functools
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_moons
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from favor_np.forecast import HAR, backtest, samples, simulated_minutes
from favor_np.interop.sklearn import (
    FavorClassifier,
    FavorFeatures,
    FavorRegressor,
    PerformerClassifier,
    PerformerRegressor,
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")

ESTIMATORS = [
    FavorRegressor(),
    FavorRegressor(num_features=64, scale=2.0, linear=False),
    FavorClassifier(),
    FavorClassifier(linear=False),
    FavorFeatures(),
    FavorFeatures(kernel="gaussian"),
    PerformerRegressor(epochs=2),
    PerformerClassifier(epochs=2),
]


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_finds_no_fault(estimator, check):
    check(estimator)


def some(rows=400, columns=3, outputs=None, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, columns))
    shape = (rows,) if outputs is None else (rows, outputs)
    y = np.sin(2 * X[:, 0]).reshape(rows, *[1] * (len(shape) - 1)) + 0.1 * rng.standard_normal(
        shape
    )
    return X, y


def exact_means(X, keys, values, scale):
    x, y = (np.hstack([z, np.full((len(z), 1), z.shape[1] ** 0.5)]) for z in (X, keys))
    angles = x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    weights = np.exp(scale * angles)
    return weights @ values / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize(("scale", "error"), [(4.0, 0.05), (16.0, 0.2)])
def test_regression_is_a_softmax_weighted_mean(linear, outputs, scale, error):
    X, y = some(outputs=outputs)
    model = FavorRegressor(2048, scale=scale, linear=linear, ridge=1e-9).fit(X, y)
    queries, values = X[:50], y.reshape(len(y), -1)
    expected = exact_means(queries, X, values, scale)
    if linear:
        slopes = np.linalg.lstsq(X - X.mean(0), values - values.mean(0), rcond=None)[0]
        expected += (queries - exact_means(queries, X, X, scale)) @ slopes
    found = model.predict(queries)
    assert found.shape == (50, *y.shape[1:])
    assert np.std(found.reshape(50, -1) - expected) < error * np.std(expected)


def test_a_line_is_found_and_continued():
    X, _ = some()
    y = X @ [1.0, -2.0, 3.0] + 5
    model = FavorRegressor(ridge=1e-9).fit(X, y)
    assert np.allclose(model.predict(10 * X), 10 * (y - 5) + 5)
    assert model.score(X, y) > 0.999999


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("estimator", [FavorRegressor(), FavorClassifier()], ids=["reg", "class"])
def test_parts_and_merges_are_the_whole(estimator, dtype):
    X, y = some(rows=1000)
    X = (X + np.array([100, 0, -1])).astype(dtype)  # far from zero: moments have to be centred ones
    options, predict = {}, "predict"
    if isinstance(estimator, FavorClassifier):
        y = np.where(y > 0, "up", "down")
        options, predict = {"classes": ["up", "down"]}, "predict_proba"
    pipe = StandardScaler().fit(X)
    X = pipe.transform(X)
    whole = getattr(clone(estimator).fit(X, y), predict)(X)
    parts = clone(estimator)
    for part in (slice(0, 10), slice(10, 700), slice(700, None)):
        parts.partial_fit(X[part], y[part], **options)
    split = [clone(estimator).fit(X[i::3], y[i::3]) for i in range(3)]
    merged = functools.reduce(lambda a, b: a.merge(b), split)
    tolerance = 2e-5 if dtype == np.float32 else 1e-10
    for other in (parts, merged, pickle.loads(pickle.dumps(merged))):
        assert np.allclose(getattr(other, predict)(X), whole, atol=tolerance)


def test_moons_are_told_apart():
    X, y = make_moons(2000, noise=0.1, random_state=0)
    model = make_pipeline(StandardScaler(), FavorClassifier())
    assert cross_val_score(model, X, y, cv=4).min() > 0.95
    assert cross_val_score(LogisticRegression(), X, y, cv=4).max() < 0.93
    chances = model.fit(X, y).predict_proba(X)
    assert np.allclose(chances.sum(1), 1)
    assert (chances >= 0).all()


def test_pipelines_searches_and_frames():
    import pandas as pd

    X, y = some(rows=600)
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    model = make_pipeline(StandardScaler(), FavorRegressor())
    grid = {"favorregressor__scale": [1.0, 16.0], "favorregressor__num_features": [64, 128]}
    found = GridSearchCV(model, grid, cv=TimeSeriesSplit(3, gap=5)).fit(frame, y)
    assert found.best_params_["favorregressor__scale"] == 16.0
    assert found.best_score_ > 0.3
    assert list(found.best_estimator_[0].feature_names_in_) == ["a", "b", "c"]
    features = FavorFeatures(8).set_output(transform="pandas").fit_transform(frame)
    assert list(features.columns) == [f"favorfeatures{i}" for i in range(8)]
    linear = make_pipeline(FavorFeatures(512, random_state=1), Ridge(1e-3)).fit(X, y)
    assert linear.score(X, y) > 0.95


def test_features_estimate_both_kernels():
    X = 0.6 * np.random.default_rng(0).standard_normal((40, 4))
    logits = 0.25 * X @ X.T
    squares = 0.125 * np.sum(X**2, 1)
    gaussian = np.exp(logits - squares - squares[:, None])
    ours, plain = (FavorFeatures(4096, scale=0.25, kernel=k) for k in ("gaussian", "softmax"))
    phi, psi = ours.fit_transform(X), plain.fit_transform(X)
    assert (phi > 0).all()
    assert np.abs(phi @ phi.T / gaussian - 1).mean() < 0.02
    assert np.abs(psi @ psi.T / np.exp(logits) - 1).mean() < 0.02
    cosines = RBFSampler(gamma=0.125, n_components=4096, random_state=0).fit_transform(X)
    assert np.abs(cosines @ cosines.T - gaussian).mean() < 0.02  # gamma is half of the scale


def test_a_backtest_takes_them():
    """Log mean squares of the last steps as columns: what HAR knows, smoothed instead of a line."""
    X, y = samples(simulated_minutes(4000, seed=5))
    squares = X[:, 0] ** 2
    columns = []
    for span in (1, 5, 22, 100):
        total = np.cumsum(np.concatenate([np.zeros(span), squares]))
        columns.append(np.log((total[span:] - total[:-span]) / span + 1e-6))
    rows = np.stack(columns, 1)
    model = make_pipeline(StandardScaler(), FavorRegressor(linear=False))
    made = backtest(model, rows, y, start=2000, refit=200)
    constant = y[:2000].mean()
    worse = made.outcome[:-1] / constant + np.log(constant)
    assert made.losses.mean() < worse.mean() - 0.02
    assert made.against(backtest(HAR(), X, y, start=2000, refit=200)).count == len(made) - 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda X, y: FavorRegressor(7).fit(X, y), ValueError, "num_features"),
        (lambda X, y: FavorRegressor(scale=0.0).fit(X, y), ValueError, "scale must be"),
        (lambda X, y: FavorRegressor(ridge=0.0).fit(X, y), ValueError, "ridge must be"),
        (lambda X, y: FavorFeatures(kernel="cosine").fit(X), ValueError, "kernel must be one of"),
        (lambda X, y: FavorRegressor().fit(X, y).merge(1), TypeError, "other must be a FavorReg"),
        (
            lambda X, y: FavorRegressor().fit(X, y).merge(FavorRegressor(64).fit(X, y)),
            ValueError,
            "the same parameters",
        ),
        (
            lambda X, y: FavorRegressor().fit(X, y).merge(FavorRegressor().fit(X[:, :2], y)),
            ValueError,
            "must have 3 columns, got 2",
        ),
        (
            lambda X, y: FavorClassifier().fit(X, y > 0).merge(FavorClassifier().fit(X, y > 9)),
            ValueError,
            "must have the classes",
        ),
        (
            lambda X, y: FavorClassifier().partial_fit(X, y > 0),
            ValueError,
            "classes must be given to the first call",
        ),
        (
            lambda X, y: FavorClassifier().fit(X, y > 0).partial_fit(X, y > 0, classes=[0, 1, 2]),
            ValueError,
            "classes must be those of the first call",
        ),
        (
            lambda X, y: FavorClassifier().fit(X, y > 0).partial_fit(X, np.full(len(X), 3)),
            ValueError,
            "not known before",
        ),
        (lambda X, y: FavorRegressor().fit(1e160 * X, y), ValueError, "X must have its largest"),
        (lambda X, y: FavorClassifier().fit(1e-160 * X, y > 0), ValueError, "X must have its larg"),
        (lambda X, y: FavorRegressor().fit(X, 1e200 * y), ValueError, "y must have its largest"),
        (
            lambda X, y: FavorRegressor().fit(X.astype("f4"), y).partial_fit(X, 1e50 * y),
            ValueError,
            r"y must have its largest number between 0 and 1e\+30",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make(*some(rows=40))
