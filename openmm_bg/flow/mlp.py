"""Residual perceptron that turns the conditioning half of a coupling layer into spline parameters."""

import torch
from torch import Tensor, nn


class FeatureLinear(nn.Linear):
    """W x + b for features-first arrays [features, batch], without a transposed copy."""

    def forward(self, x: Tensor) -> Tensor:
        """[in_features, B] to [out_features, B]."""
        return torch.addmm(self.bias.unsqueeze(1), self.weight, x)


class MLPConditioner(nn.Module):
    """Residual perceptron, h ← h + W silu(h) + b, on the values and (cos, sin) of the conditioning features.

    The output layer starts at zero, so that the coupling layer starts as the identity.

    Parameters
    ----------
    n_linear, n_circular
        Conditioning features of either kind; the linear ones come first.
    n_rows
        Number of transform parameters R.
    hidden
        Width of the hidden layers.
    n_hidden
        Number of residual layers.
    """

    def __init__(self, n_linear: int, n_circular: int, n_rows: int, hidden: int, n_hidden: int) -> None:
        super().__init__()
        self.n_linear = n_linear
        self.n_inputs = n_linear + 2 * n_circular
        # With nothing to condition on, one constant zero input keeps the shapes regular.
        self.entry = FeatureLinear(max(self.n_inputs, 1), hidden)
        self.layers = nn.ModuleList([FeatureLinear(hidden, hidden) for _ in range(n_hidden)])
        self.head = FeatureLinear(hidden, n_rows)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[C, B] conditioning features (linear, then circular in rad) to [R, B], in the network's dtype."""
        x = x.to(self.entry.weight.dtype)
        if self.n_inputs == 0:
            features = torch.zeros([1, x.shape[1]], dtype=x.dtype, device=x.device)
        else:
            angles = x[self.n_linear :]
            features = torch.cat([x[: self.n_linear], torch.cos(angles), torch.sin(angles)])
        h = self.entry(features)
        for layer in self.layers:
            h = h + layer.forward(nn.functional.silu(h))
        return self.head(nn.functional.silu(h))
