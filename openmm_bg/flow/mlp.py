"""Perceptrons that turn the conditioning half of a coupling layer into the parameters of its map."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FeatureLinear(nn.Linear):
    """W x + b for features-first arrays [features, batch], without a transposed copy."""

    def forward(self, x: Tensor) -> Tensor:
        """[in_features, B] to [out_features, B]."""
        return torch.addmm(self.bias.unsqueeze(1), self.weight, x)


class _Conditioner(nn.Module):
    """What the perceptrons share: the values and (cos, sin) that enter, and a last layer that starts at zero.

    With zero parameters the coupling layer is the identity. Of an n-fold rotor v the networks see n v, which the
    symmetry is about, and v, which tells the branches apart.
    """

    fold: Tensor
    folded: Tensor

    def __init__(self, n_linear: int, folds: Sequence[int], n_rows: int, hidden: int) -> None:
        super().__init__()
        self.n_linear = n_linear
        folded = [n_linear + i for i, n in enumerate(folds) if n > 1]
        self.n_inputs = n_linear + 2 * len(folds) + 2 * len(folded)
        self.register_buffer("fold", torch.tensor(list(folds)).reshape(-1, 1), persistent=False)
        self.register_buffer("folded", torch.tensor(folded, dtype=torch.long), persistent=False)
        # With nothing to condition on, one constant zero input keeps the shapes regular.
        self.entry = FeatureLinear(max(self.n_inputs, 1), hidden)
        self.head = FeatureLinear(hidden, n_rows)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _enter(self, x: Tensor) -> Tensor:
        """[C, B] conditioning features to [hidden, B], in the network's dtype."""
        x = x.to(self.entry.weight.dtype)
        if self.n_inputs == 0:
            features = torch.zeros([1, x.shape[1]], dtype=x.dtype, device=x.device)
        else:
            angles = torch.cat([self.fold.to(x.dtype) * x[self.n_linear :], x.index_select(0, self.folded)])
            features = torch.cat([x[: self.n_linear], torch.cos(angles), torch.sin(angles)])
        return self.entry(features)


class MLPConditioner(_Conditioner):
    """Residual perceptron, h ← h + W silu(h) + b.

    Parameters
    ----------
    n_linear
        Number of linear conditioning features; they come first.
    folds
        Of the circular ones, 1 or more each.
    n_rows
        Number of transform parameters R.
    hidden
        Width of the hidden layers.
    n_hidden
        Number of residual layers.
    """

    def __init__(self, n_linear: int, folds: Sequence[int], n_rows: int, hidden: int, n_hidden: int) -> None:
        super().__init__(n_linear, folds, n_rows, hidden)
        self.layers = nn.ModuleList([FeatureLinear(hidden, hidden) for _ in range(n_hidden)])

    def forward(self, x: Tensor) -> Tensor:
        """[C, B] conditioning features (linear, then circular in rad) to [R, B], in the network's dtype."""
        h = self._enter(x)
        for layer in self.layers:
            h = h + layer.forward(nn.functional.silu(h))
        return self.head(nn.functional.silu(h))


class GatedConditioner(_Conditioner):
    """Residual perceptron of gated linear units, h ← h + W₃ (silu(W₁ h + b₁) ⊙ (W₂ h + b₂)) + b₃.

    Shazeer, arXiv 2002.05202 (2020), "SwiGLU". Its products suit molecules: what one coordinate does to another
    depends on the torsions around it, and a sum of one-variable functions learns such a product slowly.

    Parameters
    ----------
    n_linear, folds, n_rows, hidden, n_hidden
        As of `MLPConditioner`; each of the `n_hidden` layers has three matrices.
    """

    def __init__(self, n_linear: int, folds: Sequence[int], n_rows: int, hidden: int, n_hidden: int) -> None:
        super().__init__(n_linear, folds, n_rows, hidden)
        self.up = nn.ModuleList([FeatureLinear(hidden, 2 * hidden) for _ in range(n_hidden)])
        self.down = nn.ModuleList([FeatureLinear(hidden, hidden) for _ in range(n_hidden)])

    def forward(self, x: Tensor) -> Tensor:
        """[C, B] conditioning features (linear, then circular in rad) to [R, B], in the network's dtype."""
        h = self._enter(x)
        for up, down in zip(self.up, self.down):  # noqa: B905  (TorchScript has no strict=)
            gate, value = up.forward(h).chunk(2)
            h = h + down.forward(nn.functional.silu(gate) * value)
        return self.head(h)
