"""Gated attention conditioner: one token per modelled coordinate.

Kim et al., "Scalable Normalizing Flows Enable Boltzmann Generators for Macromolecules" (2024), with the gated
attention unit of Hua et al., "Transformer Quality in Linear Time" (2022), in its quadratic form, and the
Laplace attention function of Ma et al., "Mega" (2023).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def laplace(x: Tensor) -> Tensor:
    """f(x) = ½ [1 + erf((x - √½) / (√(1/4π) √2))] of the Mega paper: 0 to 1, without normalising rows."""
    return 0.5 + 0.5 * torch.erf((x - math.sqrt(0.5)) * math.sqrt(2.0 * math.pi))


def laplace_inverse(p: float) -> float:
    """The x at which `laplace` gives p."""
    return math.sqrt(0.5) + float(torch.erfinv(torch.tensor(2.0 * p - 1.0))) / math.sqrt(2.0 * math.pi)


def relative_buckets(queries: list[int], keys: list[int], n_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """T5's bidirectional buckets of relative position (Raffel et al. 2020, section 2.1), [queries, keys].

    Half of the buckets serve keys behind the query and half keys ahead; of each half, the nearer offsets have
    a bucket of their own and the others share buckets whose width grows geometrically up to `max_distance`.
    """
    offset = torch.tensor(keys, dtype=torch.long)[None, :] - torch.tensor(queries, dtype=torch.long)[:, None]
    per_side = n_buckets // 2
    exact = per_side // 2
    distance = offset.abs()
    growth = torch.log(distance.clamp(min=1) / exact) / math.log(max_distance / exact)
    coarse = (exact + (growth * (per_side - exact)).long()).clamp(max=per_side - 1)
    return torch.where(distance < exact, distance, coarse) + per_side * (offset > 0).long()


def rotary_angles(positions: list[int], dim: int) -> Tensor:
    """Angles of the rotary embedding (Su et al. 2021, equation 15), [positions, dim / 2]."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.tensor(positions, dtype=torch.get_default_dtype())[:, None] * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of the last axis of [..., n, d] by angles given as [n, d / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x [B, n, a] times a matrix [a, b].

    `torch.matmul` chooses between two kernels by whether a gradient is wanted; they round differently, and log q of a
    sample would not be that of its coordinates.
    """
    return torch.mm(x.reshape(-1, x.shape[2]), matrix).reshape(x.shape[0], x.shape[1], matrix.shape[1])


class ScaleNorm(nn.Module):
    """x g / rms(x), with one learned scale g (Nguyen and Salazar 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor(x.square().mean(-1, keepdim=True))

    def factor(self, mean_square: Tensor) -> Tensor:
        """What a token of this mean square is multiplied by."""
        return self.scale * torch.rsqrt(mean_square + 1e-6)


class GatedAttentionUnit(nn.Module):
    """Y = X + (U ⊙ A V) W_o with A = f(Q Kᵀ / n + b), n the number of keys.

    Only unmasked tokens are handed over as keys, which is the same as zeroing masked entries of A after f.

    Parameters
    ----------
    queries, keys
        Global coordinate indices of the tokens that ask and of those that may be looked at.
    d_model, d_key, d_value
        Widths of the tokens, of Q and K (even), and of V and U.
    dropout
        Probability of dropping an entry of A in training.
    """

    cos_q: Tensor
    sin_q: Tensor
    cos_k: Tensor
    sin_k: Tensor
    buckets: Tensor

    def __init__(
        self, queries: list[int], keys: list[int], d_model: int, d_key: int, d_value: int, dropout: float
    ) -> None:
        super().__init__()
        self.n_keys = max(len(keys), 1)
        self.norm = ScaleNorm()
        self.value = nn.Linear(d_model, d_value)
        self.gate = nn.Linear(d_model, d_value)
        self.shared = nn.Linear(d_model, d_key)
        self.gamma_q = nn.Parameter(torch.ones(d_key))
        self.beta_q = nn.Parameter(torch.zeros(d_key))
        self.gamma_k = nn.Parameter(torch.ones(d_key))
        self.beta_k = nn.Parameter(torch.zeros(d_key))
        self.output = nn.Linear(d_value, d_model)
        self.dropout = nn.Dropout(dropout)
        # f(0) = 0.006 and its slope there is as small: attention would start shut, and learn slowly. The bias
        # starts where a row of A sums to about 1 instead.
        self.bias = nn.Parameter(torch.full((32,), laplace_inverse(1.0 / max(self.n_keys, 2))))
        for name, positions in (("q", queries), ("k", keys)):
            angles = rotary_angles(positions, d_key)
            self.register_buffer(f"cos_{name}", angles.cos(), persistent=False)
            self.register_buffer(f"sin_{name}", angles.sin(), persistent=False)
        self.register_buffer("buckets", relative_buckets(queries, keys), persistent=False)

    def forward(self, x_q: Tensor, x_k: Tensor) -> Tensor:
        """Tokens x_q [B, Q, d] (or [1, Q, d] for the whole batch) look at x_k [B, K, d]; [B, Q, d]."""
        seen = self.norm(x_k)
        return x_q + self.output(self.read(x_q, self.value(seen), self.shared(seen)))

    def read(self, x_q: Tensor, value: Tensor, shared: Tensor) -> Tensor:
        """U ⊙ A V [B, Q, d_value] for x_q [B or 1, Q, d], from X̂ W of the keys before their SiLU, for V and for Z."""
        silu = nn.functional.silu
        asking = self.norm(x_q)
        gate = silu(self.gate(asking))
        q = rotate(silu(self.shared(asking)) * self.gamma_q + self.beta_q, self.cos_q, self.sin_q)
        k = rotate(silu(shared) * self.gamma_k + self.beta_k, self.cos_k, self.sin_k)
        # What `laplace` does to all [K, Q] scores before and after its erf is done to q, bias and U instead, or in
        # place: each further pass over them costs as much as a tenth of their matrix product.
        slope = math.sqrt(2.0 * math.pi)
        q = q * (slope / self.n_keys)
        bias = slope * (self.bias - math.sqrt(0.5))
        bias = bias.index_select(0, self.buckets.reshape(-1)).reshape(self.buckets.shape).t()
        # Transposed, [B, K, Q]: a q without batch then needs a single matrix product.
        if q.shape[0] == 1:
            scores = product(k, q[0].t())
        else:
            scores = torch.matmul(k, q.transpose(1, 2))
        weights = self.dropout(torch.erf(scores.add_(bias)).add_(1.0))
        return 0.5 * gate * torch.matmul(weights.transpose(1, 2), silu(value))


class AttentionConditioner(nn.Module):
    """Gated attention from the conditioning tokens to the transformed ones, and a head per transformed token.

    A conditioning token carries its value, or (cos, sin) of an angle, and its position embedding; the angle v of
    an n-fold rotor comes as n v, which the symmetry is about, and as v, which tells the branches apart. A
    transformed token carries its position embedding alone, asks, and is never a key: neither attention nor
    the residual can pass its value to its own parameters. The heads start at zero (identity).

    Parameters
    ----------
    positions
        Global coordinate indices of the conditioning features; the linear ones come first.
    n_linear
        How many of them are linear.
    folds
        Of the circular ones, 1 or more each.
    targets
        Global coordinate indices of the transformed features, group by group.
    group_sizes, group_params
        Number of features, and of parameters per feature, of each group of transformed features.
    d_model, d_key, d_value, dropout
        As in `GatedAttentionUnit`.
    n_units
        Number of attention units. In one unit a parameter is a function of sums over single tokens; further
        units let conditioning tokens look at each other first.
    """

    fold: Tensor

    def __init__(
        self,
        positions: list[int],
        n_linear: int,
        folds: Sequence[int],
        targets: list[int],
        group_sizes: list[int],
        group_params: list[int],
        d_model: int,
        d_key: int,
        d_value: int,
        dropout: float,
        n_units: int,
    ) -> None:
        super().__init__()
        self.n_linear = n_linear
        self.n_tokens = len(positions)
        self.group_sizes = group_sizes
        self.embed_value = nn.Linear(1, d_model, bias=False)
        self.embed_angle = nn.Linear(4, d_model, bias=False)
        self.register_buffer("fold", torch.tensor(list(folds)).reshape(-1, 1), persistent=False)
        self.position = nn.Parameter(0.5 * torch.randn(len(positions), d_model))
        self.target = nn.Parameter(0.5 * torch.randn(len(targets), d_model))
        everyone = positions + targets
        self.units = nn.ModuleList(
            [GatedAttentionUnit(everyone, positions, d_model, d_key, d_value, dropout) for _ in range(n_units - 1)]
        )
        self.last = GatedAttentionUnit(targets, positions, d_model, d_key, d_value, dropout)
        self.mix = nn.Linear(d_model, d_model)
        self.heads = nn.ModuleList([nn.Linear(d_model, n_params) for n_params in group_params])
        for head in self.heads:
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[C, B] conditioning features (linear, then circular in rad) to [R, B], in the network's dtype."""
        x = x.to(self.position.dtype)
        batch = x.shape[1]
        features = self._features(x)
        embedding = torch.cat([self.embed_value.weight, self.embed_angle.weight], 1)
        asking = self.target.unsqueeze(0)
        if len(self.units) > 0:
            seen = product(features, embedding.t()) + self.position
            for unit in self.units:
                tokens = unit(torch.cat([seen, asking.expand(batch, -1, -1)], 1), seen)
                seen, asking = tokens[:, : self.n_tokens], tokens[:, self.n_tokens :]
            h = self.mix(self.last(asking, seen))
        else:
            # Keys have no history: X̂ W of a token is linear in its five features, but for its norm, a quadratic form
            # of them. Nothing of the width of X is computed for every frame, nor after U ⊙ A V, whose two linear maps
            # are one.
            weight = torch.cat([self.last.value.weight, self.last.shared.weight])
            bias = torch.cat([self.last.value.bias, self.last.shared.bias])
            slopes, constants = torch.mm(weight, embedding).t(), torch.mm(self.position, weight.t())
            scale = self.last.norm.factor(self._squares(features, embedding))
            both = torch.addcmul(bias, product(features, slopes) + constants, scale)
            n_value = self.last.value.weight.shape[0]
            read = self.last.read(asking, both[:, :, :n_value], both[:, :, n_value:])
            outward = torch.mm(self.mix.weight, self.last.output.weight)
            h = product(read, outward.t()) + self.mix(asking + self.last.output.bias)
        h = nn.functional.silu(h)
        rows: list[Tensor] = []
        start = 0
        for i, head in enumerate(self.heads):
            size = self.group_sizes[i]
            params = head(h[:, start : start + size])
            rows.append(params.permute(2, 1, 0).reshape(params.shape[2] * size, batch))
            start += size
        return torch.cat(rows)

    def _features(self, x: Tensor) -> Tensor:
        """[B, K, 5] of [K, B]: of each token its value, or cos and sin of n v, and of v where n > 1."""
        line, turns = x[: self.n_linear], x[self.n_linear :]
        angles, folded = self.fold.to(x.dtype) * turns, (self.fold > 1).to(x.dtype)
        none = torch.zeros_like(line)
        of_lines = torch.stack([line, none, none, none, none], -1)
        parts = [torch.zeros_like(turns), angles.cos(), angles.sin(), folded * turns.cos(), folded * turns.sin()]
        return torch.cat([of_lines, torch.stack(parts, -1)]).transpose(0, 1).contiguous()

    def _squares(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Mean square [B, K, 1] of the tokens E f + p, for features f [B, K, 5] and E [d, 5]."""
        width = embedding.shape[0]
        mixed = product(features, torch.mm(embedding.t(), embedding)) + 2.0 * torch.mm(self.position, embedding)
        squares = (features * mixed).sum(-1, keepdim=True) + self.position.square().sum(-1, keepdim=True)
        return squares.clamp(min=0.0) / width  # rounding can take a token that vanishes below zero
