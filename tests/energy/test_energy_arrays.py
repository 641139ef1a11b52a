"""Positions in every form that callers have them in: units are never lost, and what is no position is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from openmm_bg.data import load_alanine_dipeptide
from openmm_bg.energy import ContextPool, SystemTwin
from openmm_bg.energy.arrays import as_frames
from openmm_bg.errors import InputError

import openmm  # isort: skip
from openmm import unit  # isort: skip

X = np.random.default_rng(3).normal(size=(4, 5, 3))


def angstroms(x: np.ndarray) -> unit.Quantity:
    return unit.Quantity(x * 10, unit.angstrom)


def as_objects(values: list) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


FORMS = {
    "Quantity": angstroms,
    "list of Quantities": lambda x: [angstroms(frame) for frame in x],
    "tuple of Quantities": lambda x: tuple(angstroms(frame) for frame in x),
    "array of Quantities": lambda x: as_objects([angstroms(frame) for frame in x]),
    "Quantity of a list": lambda x: unit.Quantity((x * 10).tolist(), unit.angstrom),
    "Quantity of a tensor": lambda x: unit.Quantity(torch.tensor(x * 10), unit.angstrom),
    "Quantities of Vec3": lambda x: [
        unit.Quantity([openmm.Vec3(*atom) for atom in frame * 10], unit.angstrom) for frame in x
    ],
    "Quantities of atoms": lambda x: [[angstroms(atom) for atom in frame] for frame in x],
    "Quantities of coordinates": lambda x: [[[angstroms(c) for c in atom] for atom in frame] for frame in x],
    "some without a unit": lambda x: [angstroms(x[0]), *x[1:]],
    "list of tensors": lambda x: [torch.tensor(frame, requires_grad=True) for frame in x],
    "masked nowhere": lambda x: np.ma.masked_array(x, mask=np.zeros_like(x, dtype=bool)),
    "big-endian": lambda x: x.astype(">f8"),
    "fractions": lambda x: [[[Fraction(c) for c in atom] for atom in frame] for frame in x.tolist()],
    "negative bit": lambda x: torch.complex(torch.zeros(x.shape, dtype=torch.float64), torch.tensor(-x)).conj().imag,
}


@pytest.mark.parametrize("form", FORMS)
def test_numbers_in_nm(form):
    found = as_frames(FORMS[form](X), 5)
    assert found.dtype == np.float64 and found.flags.c_contiguous
    np.testing.assert_allclose(found, X, rtol=1e-12)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.int32, torch.float8_e5m2])
def test_tensors_of_any_numeric_type(kind):
    tensor = torch.tensor(10 * X).to(kind)
    np.testing.assert_array_equal(as_frames(tensor, 5), tensor.double().numpy())
    assert np.ptp(as_frames(tensor, 5)) > 10.0


def test_what_is_right_already_is_not_copied():
    x = X.copy()
    assert np.shares_memory(as_frames(x, 5), x)
    tensor = torch.tensor(x)
    assert np.shares_memory(as_frames(tensor, 5), tensor.numpy())


REFUSED = {
    "complex": (X + 1j, "complex"),
    "complex tensor": (torch.tensor(X + 1j), "complex"),
    "list of complex tensors": ([torch.tensor(frame + 1j) for frame in X], "positions must be real numbers"),
    "complex in a Quantity": (unit.Quantity(X + 1j, unit.angstrom), "complex"),
    "complex in a list": ((X + 1j).tolist(), "complex"),
    "strings": (X.astype(str), "strings"),
    "strings in a list": (X.astype(str).tolist(), "strings"),
    "bytes": (X.astype("S"), "strings"),
    "None": (None, "positions must be real numbers"),
    "None inside": ([[[None, 0.0, 0.0]] * 5], "type object"),
    "times": (np.zeros((1, 5, 3), "M8[s]"), "datetime"),
    "masked": (np.ma.masked_array(X, mask=np.ones_like(X)), "masked"),
    "one masked": (np.ma.masked_array(X, mask=np.arange(60).reshape(X.shape) == 7), "masked"),
    "masked in a list": ([np.ma.masked_array(X[0], mask=np.ones_like(X[0]))], "masked"),
    "no lengths": (unit.Quantity(X, unit.kelvin), "lengths of shape .*, not in kelvin"),
    "no lengths in a list": ([unit.Quantity(frame, unit.kelvin) for frame in X], "not in kelvin"),
    "ragged": ([X[0].tolist(), X[1][:3].tolist()], "real numbers"),
    "sparse": (torch.tensor(X).to_sparse(), "dense"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case):
    positions, match = REFUSED[case]
    with pytest.raises(InputError, match=match) as caught:
        as_frames(positions, 5)
    message = str(caught.value)
    assert message.startswith("positions must be ") and message.endswith(".") and "\n" not in message
    with pytest.raises(InputError):
        as_frames(np.zeros((1, 4, 3)), 5)


def test_the_pool_and_the_twin_keep_units(make_context, dipeptide, frames):
    quantities = [angstroms(frame) for frame in frames]
    half = torch.tensor(frames).to(torch.bfloat16)
    with ContextPool(make_context(), platform="Reference", positions=quantities) as pool:
        expected = pool.energies(frames)
        np.testing.assert_allclose(pool.energies(quantities), expected, rtol=1e-9)
        of_half = pool.energies(half)
        np.testing.assert_array_equal(of_half, pool.energies(half.double()))
    twin = SystemTwin(dipeptide[0], quantities[:2])
    np.testing.assert_allclose(twin.energies(quantities), expected, rtol=1e-6)
    np.testing.assert_allclose(twin.evaluate(half)[0].numpy(), of_half, rtol=1e-6)
    whole = torch.tensor(100 * frames).long()
    np.testing.assert_allclose(twin.evaluate(whole)[0].numpy(), twin.energies(whole.double()), rtol=1e-12)
    with pytest.raises(InputError, match="complex"):
        twin.evaluate(half.to(torch.complex64))


def test_the_flow_keeps_units():
    data = load_alanine_dipeptide()
    x = np.asarray(data.positions, dtype=np.float64).reshape(1, -1, 3)
    expected = data.flow.to_internal(x)
    for form in ([angstroms(x[0])], (angstroms(x[0]),), angstroms(x), [[angstroms(atom) for atom in x[0]]]):
        for found, right in zip(data.flow.to_internal(form), expected, strict=True):
            torch.testing.assert_close(found, right)
    with pytest.raises(InputError, match="complex"):
        data.flow.to_internal(x + 1j)
    with pytest.raises(InputError, match="complex"):
        data.flow.to_internal(torch.tensor(x + 1j))
    with pytest.raises(InputError, match="masked"):
        data.flow.to_internal(np.ma.masked_array(x, mask=x > 0))
    tensor = torch.tensor(x, requires_grad=True)
    y, _ = data.flow.to_internal(tensor)
    y.sum().backward()
    assert tensor.grad is not None and bool(torch.isfinite(tensor.grad).all())
