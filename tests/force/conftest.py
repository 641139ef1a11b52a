"""A molecule of five atoms with a flow that is cheap, wide and not Gaussian, saved as an artifact."""

import numpy as np
import pytest
import torch

import openmm  # isort: skip
from openmm import app  # isort: skip

from openmm_bg.artifact import Flow, compress_text, topology_to_dict
from openmm_bg.coordinates import Constraints, CoordinateMap, InternalCoordinates, build_zmatrix
from openmm_bg.flow import FlowConfig, build_flow
from openmm_bg.flow.completion import Completion
from openmm_bg.training.completion import describe, free_columns

#: Light atoms move fast, and a carrier lighter than its hydrogens makes Φ matter.
MASSES = [2.0, 2.0, 1.0, 4.0, 4.0]
BONDS = [(0, 1), (1, 2), (2, 3), (2, 4)]
LENGTH = 0.11


class Small:
    """C0-C1-C2H3H4 with the lengths of both hydrogens constrained."""

    def __init__(self, folder):
        self.topology = app.Topology()
        residue = self.topology.addResidue("TOY", self.topology.addChain())
        elements = [app.element.carbon] * 3 + [app.element.hydrogen] * 2
        atoms = [self.topology.addAtom(f"{e.symbol}{i}", e, residue) for i, e in enumerate(elements)]
        for i, j in BONDS:
            self.topology.addBond(atoms[i], atoms[j])
        self.system = openmm.System()
        for mass in MASSES:
            self.system.addParticle(mass)
        for h in (3, 4):
            self.system.addConstraint(2, h, LENGTH)
        self.constraints = Constraints([(3, 2), (4, 2)], [LENGTH] * 2, MASSES)
        self.frames = self._frames()
        self.path = folder / "small.bg"
        self.flow = self.make("full", self.path)

    def _frames(self, n=4000):
        rng = np.random.default_rng(0)
        zmatrix = build_zmatrix(self.topology, self.constraints.as_set())
        assert len(zmatrix.rows) == 2 and zmatrix.carrier.count(-1) == 0

        def normal(mean, spread, *shape):
            return torch.from_numpy(rng.normal(mean, spread, (n, *shape)))

        seed = torch.stack((normal(0.15, 0.02), normal(0.16, 0.02), normal(1.9, 0.2)), -1)
        first = normal(0.5, 0.5)
        phi = torch.stack((first, first + normal(2.1, 0.2)), -1)
        r = torch.full((n, 2), LENGTH, dtype=torch.float64)
        return InternalCoordinates(zmatrix).to_positions(seed, r, normal(1.9, 0.2, 2), phi).numpy()

    def make(self, representation, path, noise=0.15, completed=False):
        """An untrained flow with disturbed parameters: far from a Gaussian, and still a density; its g likewise."""
        coordinates = CoordinateMap.fit(self.topology, self.frames, self.constraints, representation)
        config = FlowConfig(split=False, n_backbone_blocks=0, n_joint_blocks=2, hidden=8, n_hidden=0, linear="affine")
        density = build_flow(coordinates.layout, config, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in density.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
        metadata = {
            "temperature": 300.0,
            "topology": topology_to_dict(self.topology),
            "system": compress_text(openmm.XmlSerializer.serialize(self.system)),
        }
        completion = None
        if completed:
            s = coordinates.to_internal(torch.from_numpy(self.frames))[1][:, free_columns(coordinates)]
            completion = Completion(coordinates.layout, describe(s, [False] * s.shape[1]), hidden=8)
            with torch.no_grad():
                for parameter in completion.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        flow = Flow(density, coordinates, metadata, completion)
        flow.save(path)
        return flow

    def draw(self, n, seed=3):
        """y [n, D] and s [n, S] of the flow and its completion that lie in the domain."""
        torch.manual_seed(seed)
        y, _ = self.flow.sample(n)
        s, _ = self.flow.complete(y)
        inside = self.flow.coordinates.in_domain(y, s)
        return y[inside], s[inside]

    def sample(self, n, seed=3):
        """y [n, D] of the flow that lie in the domain."""
        torch.manual_seed(seed)
        y, _ = self.flow.sample(n)
        return y[self.flow.coordinates.in_domain(y, self.flow.coordinates.reference_fixed)]


@pytest.fixture(scope="session")
def completed(tmp_path_factory):
    """The same molecule with a `reduced` flow and its completion."""
    small = Small(tmp_path_factory.mktemp("completed"))
    small.path = small.path.with_name("completed.bg")
    small.flow = small.make("reduced", small.path, completed=True)
    return small


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("force"))
