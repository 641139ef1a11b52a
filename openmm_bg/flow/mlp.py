"""Residual perceptron that turns the conditioning half of a coupling layer into spline parameters."""

import torch
from torch import Tensor, nn


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
        self.entry = nn.Linear(max(self.n_inputs, 1), hidden)
        self.layers = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(n_hidden)])
        self.head = nn.Linear(hidden, n_rows)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[C, B] conditioning features (linear first, then circular in rad) to [R, B], in the network's dtype."""
        x = x.to(self.entry.weight.dtype)
        if self.n_inputs == 0:
            features = torch.zeros([1, x.shape[1]], dtype=x.dtype, device=x.device)
        else:
            angles = x[self.n_linear :]
            features = torch.cat([x[: self.n_linear], torch.cos(angles), torch.sin(angles)])
        # Weights multiply from the left: the result is features first without a transposed copy.
        h = torch.addmm(self.entry.bias.unsqueeze(1), self.entry.weight, features)
        for layer in self.layers:
            h = torch.addmm(h + layer.bias.unsqueeze(1), layer.weight, nn.functional.silu(h))
        return torch.addmm(self.head.bias.unsqueeze(1), self.head.weight, nn.functional.silu(h))
