"""A Gaussian process on few noisy measurements."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

FloatArray = NDArray[np.float64]


class GaussianProcess:
    """Regression with a Matern 5/2 kernel, a length scale a feature, and noise of unknown size.

    Hyperparameters maximise the likelihood; they are searched for from the former ones.  Features
    should be of order one.

    Parameters
    ----------
    features : int
    """

    def __init__(self, features: int) -> None:
        self._kernel = (
            ConstantKernel(1.0, (1e-2, 1e2))
            * Matern(np.ones(features), (0.1, 1e2), nu=2.5)
            + WhiteKernel(0.1, (1e-4, 1.0))
        )  # fmt: skip
        self._model: GaussianProcessRegressor | None = None

    def fit(self, features: FloatArray, values: FloatArray, *, search: bool = True) -> None:
        """Learn from measurements: features [measurement, feature], values [measurement].

        Without ``search`` the hyperparameters stay as they are.
        """
        self._shift, self._size = float(values.mean()), float(values.std()) or 1.0
        self._model = GaussianProcessRegressor(
            self._kernel, optimizer="fmin_l_bfgs_b" if search else None
        )
        with warnings.catch_warnings():  # a length scale at its bound: a feature without effect
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.fit(features, (values - self._shift) / self._size)
        self._kernel = self._model.kernel_

    def predict(self, features: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and standard deviation of the value without noise, [row] each."""
        assert self._model is not None, "fit comes first"
        mean, std = self._model.predict(features, return_std=True)
        noise = self._kernel.k2.noise_level
        certain = np.sqrt(np.maximum(std**2 - noise, 0.0))
        return self._shift + self._size * mean, self._size * certain

    @property
    def noise_std(self) -> float:
        """Return the standard deviation of the noise of a measurement."""
        return self._size * float(np.sqrt(self._kernel.k2.noise_level))
