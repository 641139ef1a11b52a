"""Two dimensions in which data and generated frames can be looked at together."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis.distances import ANGSTROM, pair_distances
from openmm_bg.errors import InputError

FloatArray = NDArray[np.float64]
Method = Literal["auto", "umap", "pca"]


def choose_method(method: Method) -> Literal["umap", "pca"]:
    """The method that "auto" means here; quick, so that a user hears of a missing package before any long work.

    Raises
    ------
    InputError
        UMAP is asked for and not installed, or the method is unknown.
    """
    if method not in ("auto", "umap", "pca"):
        raise InputError(f"Unknown embedding {method!r}: choose auto, umap or pca.")
    if method != "pca":
        try:
            import umap  # noqa: F401
        except ImportError:
            if method == "umap":
                raise InputError(
                    "UMAP is not installed: pip install openmm-bg[umap], or use --embedding pca."
                ) from None
        else:
            return "umap"
    return "pca"


def embed(
    generated: ArrayLike, data: ArrayLike, atoms: ArrayLike, *, method: Method = "auto", seed: int = 0
) -> dict[str, Any]:
    """A map of backbone distances to two dimensions, fitted to the data and applied to both.

    Parameters
    ----------
    generated, data : array_like, shape [n, N, 3] and [m, N, 3]
        nm; at least three data frames, a thousand or so of each.
    atoms : array_like of int
        From `distances.backbone_atoms`.
    method : {"auto", "umap", "pca"}
        "auto" takes UMAP where the extra ``umap`` is installed, principal components elsewhere.
    seed : int
        Of UMAP.

    Returns
    -------
    dict
        ``method`` ("umap" or "pca"), ``generated`` [n, 2], ``data`` [m, 2] (Å for "pca"), and of "pca" ``explained``,
        the share of the data's variance.

    Raises
    ------
    InputError
        UMAP is asked for and not installed; fewer than three data frames or distances.

    References
    ----------
    McInnes et al., arXiv 1802.03426 (2018).
    """
    x, y = ANGSTROM * pair_distances(generated, atoms), ANGSTROM * pair_distances(data, atoms)
    if len(y) < 3 or y.shape[1] < 2:
        raise InputError(f"An embedding needs three data frames and two distances, got {len(y)} and {y.shape[1]}.")
    if choose_method(method) == "umap":
        import umap

        neighbours = min(15, len(y) - 1)
        mapping = umap.UMAP(n_components=2, n_neighbors=neighbours, random_state=seed, n_jobs=1).fit(y)
        return {
            "method": "umap",
            "generated": np.asarray(mapping.transform(x), np.float64),
            "data": np.asarray(mapping.embedding_, np.float64),
        }
    centre = y.mean(0)
    _, size, axes = np.linalg.svd(y - centre, full_matrices=False)
    two = axes[:2] * np.sign(axes[:2][np.arange(2), np.abs(axes[:2]).argmax(1)])[:, None]  # one sign of the two
    total = float((size**2).sum())
    return {
        "method": "pca",
        "generated": (x - centre) @ two.T,
        "data": (y - centre) @ two.T,
        "explained": float((size[:2] ** 2).sum() / total) if total > 0 else float("nan"),
    }
