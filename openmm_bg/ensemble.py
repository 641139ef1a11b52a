"""`Ensemble`: weighted samples with everything needed to turn them into averages (formulas A and B)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError
from openmm_bg.weights import (
    check_log_weights,
    check_not_all_zero,
    effective_sample_size,
    expectation,
    khat_threshold,
    max_weight,
    pareto_khat,
    resample,
)

if TYPE_CHECKING:
    from openmm.app import Topology

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

# Frames are handed to an observable in chunks of about this many bytes of positions.
_CHUNK_BYTES = 32 * 1024**2


@dataclass(eq=False, repr=False)
class Ensemble:
    """Samples of a flow with everything needed to turn them into averages of the force field.

    Parameters
    ----------
    positions : ndarray, shape [n, N, 3], nm
    reduced_potentials : ndarray, shape [n]
        u = U/kT at the target's temperature.
    log_q : ndarray, shape [n]
        Log-density of the flow (formula A: of all internal coordinates; B: of the modelled ones; C: of the modelled
        ones and of the completion's, log q + log g).
    log_weights : ndarray, shape [n]
        -inf where the weight is zero; unclipped.
    n_nonfinite : int
        How many samples have weight zero because they lay outside the coordinates' domain or their energy
        was not finite.
    label : str
        What the weights are exact for: "exact" (formula A or C, the force field) or "rigid" (formula B, the
        conditional density at fixed values of the coordinates that are not modelled, and nothing else).
    topology : openmm.app.Topology, optional

    Raises
    ------
    InputError
        If shapes disagree, a log-weight is NaN or +inf, or a sample of non-zero weight has a reduced
        potential or log-density that is not finite.
    """

    positions: FloatArray
    reduced_potentials: FloatArray
    log_q: FloatArray
    log_weights: FloatArray
    n_nonfinite: int = 0
    label: str = "exact"
    topology: Topology | None = None
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.positions = np.asarray(self.positions, dtype=np.float64)
        self.log_weights = check_log_weights(self.log_weights)
        n = self.log_weights.size
        if self.positions.ndim != 3 or self.positions.shape[0] != n or self.positions.shape[2] != 3:
            raise InputError(f"positions must have shape [{n}, atoms, 3], got {self.positions.shape}.")
        weighty = self.log_weights > -np.inf
        for name in ("reduced_potentials", "log_q"):
            array = np.asarray(getattr(self, name), dtype=np.float64)
            if array.shape != (n,):
                raise InputError(f"{name} must have shape [{n}], got {array.shape}.")
            if not np.all(np.isfinite(array[weighty])):
                raise InputError(f"{name} must be finite wherever the weight is not zero.")
            setattr(self, name, array)
        if self.topology is not None and self.topology.getNumAtoms() != self.positions.shape[1]:
            raise InputError(
                f"The topology has {self.topology.getNumAtoms()} atoms and the positions have "
                f"{self.positions.shape[1]}: pass the topology of the sampled molecule."
            )

    @property
    def n(self) -> int:
        """Number of samples, those of weight zero included."""
        return int(self.log_weights.size)

    def __len__(self) -> int:
        return self.n

    @cached_property
    def ess(self) -> float:
        """Effective sample size as a fraction of n (`effective_sample_size`)."""
        return effective_sample_size(self.log_weights)

    @cached_property
    def khat(self) -> float:
        """Pareto k̂ of the weights (`pareto_khat`)."""
        return pareto_khat(self.log_weights)

    @property
    def max_weight(self) -> float:
        """Largest share of one sample."""
        return max_weight(self.log_weights)

    @property
    def trustworthy(self) -> bool:
        """Whether k̂ lies below `khat_threshold`, so that error bars may be believed."""
        return self.khat < khat_threshold(self.n)

    def __repr__(self) -> str:
        return (
            f"Ensemble({self.label}, n={self.n}, atoms={self.positions.shape[1]}, ESS={self.ess:.3g}, "
            f"k-hat={self.khat:.2f} (trusted below {khat_threshold(self.n):.2f}), "
            f"largest share={self.max_weight:.2g}, non-finite={self.n_nonfinite})"
        )

    def expectation(self, f: Callable[[FloatArray], ArrayLike]) -> tuple[Any, Any]:
        """Weighted mean of an observable and its standard error.

        Parameters
        ----------
        f : callable
            Takes positions [m, N, 3] (nm) and returns one value or array per frame, [m, ...]. It is called on
            chunks of frames, so a frame's value must not depend on the other frames; frames of weight zero
            are never shown to it.

        Returns
        -------
        value, error : ndarray of shape [...], or floats for one number per frame
            For an ensemble labelled "rigid" this is an average over that manifold, not of the force field.

        Raises
        ------
        InputError
            If all weights are zero, or if f returns a wrong number of frames or values that are not finite.
        """
        log_w = check_not_all_zero(self.log_weights)
        if not self.trustworthy and not self._warned:
            self._warned = True
            logger.warning(
                "Pareto k-hat %.2f of %d weights is not below %.2f: error bars from these weights cannot be "
                "trusted; draw more samples or train the flow further.",
                self.khat,
                self.n,
                khat_threshold(self.n),
            )
        kept = np.flatnonzero(log_w > -np.inf)
        chunk = max(1, _CHUNK_BYTES // (self.positions[0].nbytes or 1))
        parts = []
        for start in range(0, kept.size, chunk):
            rows = kept[start : start + chunk]
            values = np.asarray(f(self.positions[rows]), dtype=np.float64)
            if values.ndim == 0 or values.shape[0] != rows.size:
                raise InputError(
                    f"The observable must return one entry per frame ({rows.size}) along its first axis, "
                    f"got shape {values.shape}."
                )
            parts.append(values)
        zeros = np.full(self.n - kept.size, -np.inf)
        # Samples of weight zero count in n; their values do not matter.
        values = np.concatenate([*parts, np.zeros((zeros.size, *parts[0].shape[1:]))])
        return expectation(values, np.concatenate([log_w[kept], zeros]))

    def resample(self, n: int, seed: int = 0) -> FloatArray:
        """Positions [n, N, 3] (nm) of equal weight; heavy samples repeat (see `weights.resample`)."""
        return self.positions[resample(self.log_weights, n, np.random.default_rng(seed))]

    def to_mdtraj(self) -> Any:
        """All samples as an mdtraj.Trajectory, unweighted and in float32; `log_weights` belong beside it.

        Raises
        ------
        InputError
            If the ensemble has no topology.
        """
        if self.topology is None:
            raise InputError("This ensemble has no topology: set ensemble.topology to the molecule's Topology.")
        import mdtraj

        return mdtraj.Trajectory(self.positions, mdtraj.Topology.from_openmm(self.topology))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the topology to an .npz file; an existing file is replaced in one step."""
        target = Path(path)
        temporary = target.with_name(target.name + ".part")
        with open(temporary, "wb") as handle:
            np.savez(
                handle,
                positions=self.positions,
                reduced_potentials=self.reduced_potentials,
                log_q=self.log_q,
                log_weights=self.log_weights,
                n_nonfinite=np.int64(self.n_nonfinite),
                label=np.str_(self.label),
            )
        os.replace(temporary, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str], topology: Topology | None = None) -> Ensemble:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If the file is missing, truncated or was not written by `save`.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                return cls(
                    data["positions"],
                    data["reduced_potentials"],
                    data["log_q"],
                    data["log_weights"],
                    int(data["n_nonfinite"]),
                    str(data["label"]),
                    topology,
                )
        except InputError:
            raise
        except Exception as error:  # numpy raises half a dozen types for a damaged archive
            raise InputError(f"{os.fspath(path)} is not an ensemble written by Ensemble.save ({error}).") from error
