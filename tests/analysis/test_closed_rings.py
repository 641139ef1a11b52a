"""Molecules with a bond that closes a large ring and is no coordinate: evaluated and reported like any other."""

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.analysis.evaluation_input import check_frames
from openmm_bg.analysis.report import report_page
from openmm_bg.artifact import Flow, compress_text, topology_to_dict
from openmm_bg.coordinates import CoordinateMap, read_constraints
from openmm_bg.coordinates.bond_lengths import check_bond_lengths
from openmm_bg.coordinates.graph import MoleculeGraph
from openmm_bg.errors import InputError
from openmm_bg.flow import FlowConfig, build_flow

import openmm  # isort: skip
from openmm import app  # isort: skip

ONE = {"platform": "Reference", "n_workers": 1, "progress": False}
LOOP = ["NGLY", "CYX", "ALA", "GLY", "SER", "CYX", "CLYS"]
#: Name: force field, representation. With amber's names CHARMM's patch DISU finds the bridge by its bonds.
MOLECULES = {
    "disulfide, amber14": ("amber14-all.xml", "reduced"),
    "disulfide, charmm36": ("charmm36.xml", "full"),
    "macrocycle": ("amber14-all.xml", "full"),
}


def several_shapes(system: openmm.System, start: np.ndarray, rounds: int = 12) -> np.ndarray:
    """Frames [10 rounds, N, 3]: a shape that is shaken at 800 K for 2 ps, then ten frames of it at 300 K."""
    integrator = openmm.LangevinMiddleIntegrator(300, 5, 0.002)
    integrator.setRandomNumberSeed(3)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(start)
    openmm.LocalEnergyMinimizer.minimize(context, 10, 300)
    frames = []
    for k in range(rounds):
        for kelvin, steps in ((800, 1000), (300, 200)):
            integrator.setTemperature(kelvin)
            context.setVelocitiesToTemperature(kelvin, k + 1)
            integrator.step(steps)
        for _ in range(10):
            integrator.step(10)
            frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    return np.array(frames)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if "charmm" in name else []) for name in MOLECULES],
)
def ring(request, proteins):
    """(topology, the bond that closes the ring, frames [120, N, 3], an untrained flow with their statistics)."""
    field, representation = MOLECULES[request.param]
    if request.param == "macrocycle":
        topology = proteins.build_topology(field, ["GLY"] * 6)
        start = proteins.idealised(topology)  # before it is closed: a ring of eighteen bonds at regular angles
        named = {(a.residue.index, a.name): a for a in topology.atoms()}
        topology.addBond(named[5, "C"], named[0, "N"])
    else:
        topology = proteins.build_topology("amber14-all.xml", LOOP, [(1, 5)])
        start = proteins.idealised(topology)
    system = app.ForceField(field).createSystem(topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds)
    frames = several_shapes(system, start)
    coordinates = CoordinateMap.fit(topology, frames, read_constraints(system, topology), representation)
    tree = {frozenset(row[:2]) for row in coordinates.zmatrix.rows}
    tree |= {frozenset(coordinates.zmatrix.seed[:2]), frozenset(coordinates.zmatrix.seed[1:])}
    (closing,) = (bond for a, b in topology.bonds() if (bond := (a.index, b.index)) and frozenset(bond) not in tree)
    config = FlowConfig(n_backbone_blocks=2, n_joint_blocks=2, hidden=16)
    metadata = {
        "temperature": 300.0,
        "topology": topology_to_dict(topology),
        "system": compress_text(openmm.XmlSerializer.serialize(system)),
    }
    return topology, closing, frames, Flow(build_flow(coordinates.layout, config, seed=1), coordinates, metadata)


def length(frames: np.ndarray, bond: tuple[int, int]) -> np.ndarray:
    return np.linalg.norm(frames[:, bond[0]] - frames[:, bond[1]], axis=-1)


def test_evaluate_and_report_take_its_frames(ring, tmp_path):
    _, closing, frames, flow = ring
    layout = flow.coordinates.layout
    y = torch.tensor(layout.shift, dtype=torch.float64) / torch.tensor(layout.fold, dtype=torch.float64)
    mean_point = flow.to_positions(y[None]).numpy()
    # What this test is about: the mean point of the coordinates is no conformation, the ring stands open there.
    ratio = length(mean_point, closing)[0] / length(frames, closing).mean()
    assert not 1 / 1.5 < ratio < 1.5
    found = bg.evaluate(flow, frames[1::2], frames[::2], n_samples=30, batch=30, embedding="pca", **ONE)
    assert found.figures["about"]["held_out_frames"] == 60 and found.figures["novelty"]["known"] == 60
    assert np.isfinite(found.figures["nll"]["total_mean"])
    minimised = found.figures["novelty"]["minimised_data"]
    assert all(row["after"] < row["before"] < row["after"] + 200.0 for row in minimised)  # kcal/mol, of real frames
    page = report_page(tmp_path / "report.html", found, flow).read_text("utf-8")
    assert "Structures" in page and "Novelty" in page


def test_an_open_ring_is_refused(ring):
    topology, closing, frames, _ = ring
    check_frames(frames, topology, "the trajectory")
    for frame, factor in ((0, 1.8), (7, 2.5), (7, 0.3)):
        bad = frames.copy()
        a, b = closing
        bad[frame, a] = bad[frame, b] + factor * (bad[frame, a] - bad[frame, b])
        with pytest.raises(InputError, match=rf"In frame {frame} of the trajectory the bond .* nm: another molecule"):
            check_frames(bad, topology, "the trajectory")


def test_frames_that_are_no_molecule(ring):
    topology, _, frames, _ = ring
    graph = MoleculeGraph(topology)
    for bad, message in (
        (0.0 * frames, "0.000 nm"),
        (10.0 * frames, "wrong units"),
        (0.1 * frames, "wrong units"),
        (np.where(np.arange(len(frames))[:, None, None] == 33, np.nan, frames), "Frame 33 .* non-finite"),
    ):
        with pytest.raises(InputError, match=message):
            check_bond_lengths(bad, graph, "the trajectory")
