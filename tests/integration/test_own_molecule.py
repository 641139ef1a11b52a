"""A user's own molecule, through files and commands: butane, from MD to samples whose averages are right."""

import itertools

import mdtraj
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

import openmm_bg as bg
from openmm_bg.cli import main
from openmm_bg.coordinates import InternalCoordinates, build_zmatrix
from openmm_bg.errors import ArtifactError, InputError
from openmm_bg.free_energy import statistical_inefficiency
from openmm_bg.simulate import torsion_angle

import openmm  # isort: skip
from openmm import app, unit  # isort: skip

TORSION = (0, 1, 2, 3)
CONFIG = {
    "batch_size": 256,
    "validate_every": 100,
    "ema_decay": 0.98,
    "flow": {"n_backbone_blocks": 2, "n_joint_blocks": 4, "hidden": 64},
    "buffer": {"draw_size": 512, "draw_every": 8},
    "stages": [
        {"name": "likelihood", "losses": {"nll": 1.0}, "steps": 150, "learning_rate": 5e-3},
        {"name": "buffer", "losses": {"buffer": 1.0}, "steps": 300, "learning_rate": 2e-3},
    ],
}


def butane() -> tuple[app.Topology, openmm.System, np.ndarray]:
    """Harmonic bonds and angles, a torsion with gauche and trans, HBonds constraints."""
    topology = app.Topology()
    residue = topology.addResidue("BUT", topology.addChain())
    carbons = [topology.addAtom(f"C{i}", app.Element.getBySymbol("C"), residue) for i in range(4)]
    for a, b in itertools.pairwise(carbons):
        topology.addBond(a, b)
    for carbon, count in zip(carbons, (3, 2, 2, 3), strict=True):
        for k in range(count):
            hydrogen = topology.addAtom(f"H{carbon.index}{k}", app.Element.getBySymbol("H"), residue)
            topology.addBond(carbon, hydrogen)
    system = openmm.System()
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    torsions = openmm.PeriodicTorsionForce()
    neighbours: dict[int, list[int]] = {}
    for a, b in topology.bonds():
        heavy = a.element.symbol == b.element.symbol == "C"
        if heavy:
            bonds.addBond(a.index, b.index, 0.153, 250_000.0)
        else:
            system.addConstraint(a.index, b.index, 0.109)
        neighbours.setdefault(a.index, []).append(b.index)
        neighbours.setdefault(b.index, []).append(a.index)
    for centre, around in neighbours.items():
        for a, b in itertools.combinations(around, 2):
            angles.addAngle(a, centre, b, 1.911, 350.0)
    torsions.addTorsion(0, 1, 2, 3, 3, 0.0, 3.0)
    torsions.addTorsion(0, 1, 2, 3, 1, 0.0, 1.0)
    for i, j in ((0, 1), (1, 2), (2, 3)):
        for a in neighbours[i]:
            for b in neighbours[j]:
                if a != j and b != i and not (a < 4 and b < 4):
                    torsions.addTorsion(a, i, j, b, 3, 0.0, 0.3)
    for force in (bonds, angles, torsions, openmm.CMMotionRemover()):
        system.addForce(force)
    zmatrix = build_zmatrix(topology)
    rows = len(zmatrix.rows)
    phi = torch.zeros(1, rows, dtype=torch.float64)
    for parent in {row[1] for row in zmatrix.rows}:
        group = [k for k, row in enumerate(zmatrix.rows) if row[1] == parent]
        for place, k in enumerate(group):
            first = 0.0 if zmatrix.carrier[k] >= 0 else 2.0944  # beside seed atom 2 there is no carrier
            phi[0, k] = np.pi * (zmatrix.carrier[k] >= 0) + first + 2.0944 * place
    length = torch.tensor([[0.153 if row[0] < 4 else 0.109 for row in zmatrix.rows]], dtype=torch.float64)
    seed = torch.tensor([[0.153, 0.153, 1.911]], dtype=torch.float64)
    positions = InternalCoordinates(zmatrix).to_positions(seed, length, torch.full_like(length, 1.911), phi)[0]
    return topology, system, positions.numpy()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """system.xml, top.pdb, traj.dcd and the frames in memory."""
    folder = tmp_path_factory.mktemp("butane")
    topology, system, positions = butane()
    integrator = openmm.LangevinMiddleIntegrator(300.0, 2.0, 0.001)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(300.0, 1)
    integrator.step(2000)
    frames = []
    for _ in range(6000):
        integrator.step(50)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    xyz = np.array(frames, dtype=np.float32)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    with open(folder / "top.pdb", "w") as handle:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, handle)
    mdtraj.Trajectory(xyz, mdtraj.Topology.from_openmm(topology)).save_dcd(str(folder / "traj.dcd"))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder, topology, system, xyz


def command(folder, *extra, **changes):
    options = {
        "--system": "system.xml",
        "--topology": "top.pdb",
        "--trajectory": "traj.dcd",
        "--temperature": "300",
        "--config": "config.yaml",
    } | changes
    arguments = ["train"]
    for name, value in options.items():
        is_file = name not in ("--temperature",)
        arguments += [name, str(folder / value) if is_file else value]
    return CliRunner().invoke(main, [*arguments, "--platform", "Reference", "--workers", "1", *extra])


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("model")
    result = command(files[0], "-o", str(output))
    assert result.exit_code == 0, result.output
    assert "effective sample size" in result.output
    return output


@pytest.mark.slow
@pytest.mark.statistical
def test_train_and_sample_give_md_averages(files, trained, tmp_path):
    folder, topology, _, xyz = files
    out = tmp_path / "out.dcd"
    result = CliRunner().invoke(
        main, ["sample", str(trained / "flow.bg"), "-n", "20000", "-o", str(out), "--platform", "Reference"]
    )
    assert result.exit_code == 0, result.output
    samples = mdtraj.load(str(out), top=str(folder / "top.pdb"))
    with np.load(tmp_path / "out.npz") as data:
        log_w, u, log_q = data["log_weights"], data["reduced_potentials"], data["log_q"]
        assert int(data["n_samples"]) == 20000 and str(data["label"]) == "exact"
    assert len(samples) == len(log_w) == len(u) == len(log_q) <= 20000
    assert {p.name for p in tmp_path.iterdir()} == {"out.dcd", "out.npz"}
    flow = bg.load(trained / "flow.bg", topology=topology)
    assert bg.Ensemble(samples.xyz, u, log_q, log_w).ess > 0.2
    # An observable of MD alone, of weights, and their difference in standard errors. Torsions hop in 0.3 ns of MD.
    observables = {
        "trans": lambda x: (np.abs(torsion_angle(x, TORSION)) > 2.0).astype(float),
        "end to end": lambda x: np.linalg.norm(x[:, 0] - x[:, 3], axis=-1),
        "H-C-H": lambda x: np.einsum("ij,ij->i", x[:, 4] - x[:, 0], x[:, 5] - x[:, 0]) / 0.109**2,
    }
    ensemble = bg.Ensemble(samples.xyz, u, log_q, log_w)
    scores = {}
    for name, f in observables.items():
        series = np.asarray(f(xyz), dtype=float)
        md_error = series.std(ddof=1) * np.sqrt(statistical_inefficiency(series) / len(series))
        value, error = ensemble.expectation(f)
        scores[name] = (value - series.mean()) / np.hypot(error, md_error)
    print(scores)
    assert all(abs(z) < 4.0 for z in scores.values()), scores
    # The flow alone, without weights, must be told apart from the target by the same measure.
    plain = bg.Ensemble(samples.xyz, u, log_q, np.zeros_like(log_w))
    worst = 0.0
    for f in observables.values():
        value, error = plain.expectation(f)
        exact, exact_error = ensemble.expectation(f)
        worst = max(worst, abs(value - exact) / np.hypot(error, exact_error))
    assert worst > 4.0
    assert flow.metadata["training"]["steps"] == 450


@pytest.mark.slow
def test_interrupted_training_resumes_and_a_finished_one_is_not_overwritten(files, trained):
    again = command(files[0], "-o", str(trained))
    assert again.exit_code == 1 and "resume" in again.output and "Traceback" not in again.output
    before = (trained / "losses.csv").read_bytes()
    resumed = command(files[0], "-o", str(trained), "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert (trained / "losses.csv").read_bytes() == before


def test_resume_with_another_target_is_refused(files, trained):
    folder, *_ = files
    before = (trained / "flow.bg").read_bytes()
    one_sentence(command(folder, "-o", str(trained), "--resume", **{"--temperature": "400"}), "data")
    assert (trained / "flow.bg").read_bytes() == before


def one_sentence(result, *parts):
    lines = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert result.exit_code == 1 and len(lines) == 1 and "Traceback" not in result.output, result.output
    for part in parts:
        assert part in lines[0], lines[0]


def test_wrong_files_are_one_sentence_each(files, tmp_path):
    folder, topology, _, xyz = files
    out = str(tmp_path / "model")
    one_sentence(command(folder, "-o", out, **{"--system": "absent.xml"}), "absent.xml")
    one_sentence(command(folder, "-o", out, **{"--system": "top.pdb"}), "not a System")
    one_sentence(command(folder, "-o", out, **{"--topology": "traj.dcd"}), "traj.dcd is not a readable PDB")
    one_sentence(command(folder, "-o", out, **{"--trajectory": "absent.dcd"}), "absent.dcd")
    one_sentence(command(folder, "-o", out, **{"--trajectory": "system.xml"}), "MDTraj cannot read")
    one_sentence(command(folder, "-o", out, **{"--temperature": "-5"}), "temperature")
    one_sentence(command(folder, "-o", out, **{"--config": "absent.yaml"}), "absent.yaml")
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(CONFIG | {"learnign_rate": 1}))
    one_sentence(command(folder, "-o", out, **{"--config": str(tmp_path / "bad.yaml")}), "learnign_rate")
    short = mdtraj.Trajectory(xyz[:5, :13], mdtraj.Topology.from_openmm(topology).subset(range(13)))
    short.save_dcd(str(tmp_path / "short.dcd"))
    one_sentence(command(folder, "-o", out, **{"--trajectory": str(tmp_path / "short.dcd")}), "short.dcd")
    order = [1, 0, *range(2, 14)]
    mdtraj.Trajectory(xyz[:20, order], mdtraj.Topology.from_openmm(topology)).save_dcd(str(tmp_path / "order.dcd"))
    one_sentence(command(folder, "-o", out, **{"--trajectory": str(tmp_path / "order.dcd")}), "atom order")
    bad = xyz[:20].copy()
    bad[7] = np.nan
    mdtraj.Trajectory(bad, mdtraj.Topology.from_openmm(topology)).save_dcd(str(tmp_path / "nan.dcd"))
    one_sentence(command(folder, "-o", out, **{"--trajectory": str(tmp_path / "nan.dcd")}), "non-finite")
    for k in (0, len(xyz) - 1):  # in any frame: the first may be whole
        later = xyz.copy()
        later[k:] *= 10.0  # Å
        mdtraj.Trajectory(later, mdtraj.Topology.from_openmm(topology)).save_dcd(str(tmp_path / "later.dcd"))
        one_sentence(command(folder, "-o", out, **{"--trajectory": str(tmp_path / "later.dcd")}), f"frame {k} of")
    assert not (tmp_path / "model").exists()


def test_presets_by_name_in_python(files):
    _, topology, system, xyz = files
    for preset in ("cpu", "protein", "paper"):
        with pytest.raises(InputError, match="no frames"):  # read before the frames are looked at
            bg.train(system, topology, xyz[:0], 300.0, config=preset)


@pytest.mark.parametrize("preset", ["protein", "paper"])
def test_presets_by_name(files, tmp_path, preset):
    """As in README's first lines on proteins; the refusal shows that it is the preset's W2 that asks for frames."""
    folder, topology, _, xyz = files
    mdtraj.Trajectory(xyz[:100], mdtraj.Topology.from_openmm(topology)).save_dcd(str(tmp_path / "few.dcd"))
    arguments = ["train", "--system", str(folder / "system.xml"), "--topology", str(folder / "top.pdb")]
    arguments += ["--trajectory", str(tmp_path / "few.dcd"), "--temperature", "300", "--preset", preset]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "model"), "--platform", "Reference"])
    one_sentence(result, "nll+w2", str(bg.TrainingConfig.preset(preset).w2_data_batch))
    assert not (tmp_path / "model").exists()


def test_a_file_without_a_representation_is_told(files, tmp_path, caplog):
    wrong = {"--temperature": "-5"}
    one_sentence(command(files[0], "-o", tmp_path / "model", **wrong), "temperature")
    assert "--representation reduced" in caplog.text
    caplog.clear()
    one_sentence(command(files[0], "-o", tmp_path / "model", "--representation", "full", **wrong), "temperature")
    assert "--representation" not in caplog.text


def test_topologies_that_are_not_one_molecule(files):
    _, topology, system, xyz = files
    two = app.Topology()
    residue = two.addResidue("BUT", two.addChain())
    atoms = [two.addAtom(a.name, a.element, residue) for a in topology.atoms()]
    for a, b in topology.bonds():
        if {a.index, b.index} != {1, 2}:
            two.addBond(atoms[a.index], atoms[b.index])
    with pytest.raises(InputError, match="not one molecule"):
        bg.train(system, two, xyz, 300.0)
    none = app.Topology()
    residue = none.addResidue("BUT", none.addChain())
    for a in topology.atoms():
        none.addAtom(a.name, a.element, residue)
    with pytest.raises(InputError, match="no bonds"):
        bg.train(system, none, xyz, 300.0)
    with pytest.raises(InputError, match="log_weights"):
        bg.train(system, topology, xyz, 300.0, log_weights=np.zeros(3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"system": "system.xml"}, "openmm.System"),
        ({"topology": "top.pdb"}, "app.Topology"),
        ({"trajectory": None}, "NoneType"),
        ({"trajectory": [["a", "b"]]}, "array in nm"),
        ({"temperature": None}, "number of kelvin"),
        ({"temperature": True}, "number of kelvin"),
        ({"temperature": 1.0 * unit.picosecond}, "in kelvin"),
        ({"log_weights": "weights"}, "numbers"),
    ],
)
def test_arguments_of_another_kind(files, change, says):
    _, topology, system, xyz = files
    arguments = {"system": system, "topology": topology, "trajectory": xyz, "temperature": 300.0} | change
    with pytest.raises(InputError, match=says):
        bg.train(**arguments)


def test_a_ring_without_its_last_bond():
    topology = app.Topology()
    residue = topology.addResidue("RNG", topology.addChain())
    atoms = [topology.addAtom(f"C{i}", app.element.carbon, residue) for i in range(4)]
    for a, b in itertools.pairwise(atoms):
        topology.addBond(a, b)
    system = openmm.System()
    for _ in atoms:
        system.addParticle(12.0)
    square = 0.155 * np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    with pytest.raises(InputError, match=r"C0 and .*C3 are 0.155 nm apart"):
        bg.train(system, topology, square + np.zeros((5, 1, 1)), 300.0)


def test_one_frame_is_no_trajectory(files, tmp_path):
    folder, topology, *_, xyz = files
    mdtraj.Trajectory(xyz[:1], mdtraj.Topology.from_openmm(topology)).save_dcd(str(tmp_path / "one.dcd"))
    one_sentence(command(folder, "-o", tmp_path / "model", **{"--trajectory": str(tmp_path / "one.dcd")}), "one.dcd")


@pytest.mark.parametrize("reason", ["CustomExternalForce", "periodic box"])
def test_training_announces_that_sample_will_refuse(files, caplog, reason):
    """Before the long work, not after it: such a flow serves step() alone."""
    _, topology, system, xyz = files
    held = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    if reason == "periodic box":
        ewald = openmm.NonbondedForce()
        ewald.setNonbondedMethod(openmm.NonbondedForce.PME)
        for _ in range(system.getNumParticles()):
            ewald.addParticle(0.0, 0.1, 0.0)
        held.addForce(ewald)
    else:
        wall = openmm.CustomExternalForce("x^2")
        wall.addParticle(0)
        held.addForce(wall)
    brief = {**CONFIG, "stages": [{"name": "likelihood", "losses": {"nll": 1.0}, "steps": 1}]}
    bg.train(held, topology, xyz[:200], 300.0, config=brief, progress=False)
    assert reason in caplog.text and "will refuse" in caplog.text


def test_sample_refuses_what_it_cannot_write(tmp_path):
    runner = CliRunner()
    shipped = str(bg.load_alanine_dipeptide.__globals__["files"]("openmm_bg.data") / "alanine_dipeptide.bg")
    one_sentence(runner.invoke(main, ["sample", shipped, "-n", "0", "-o", str(tmp_path / "a.dcd")]), "at least 1")
    one_sentence(runner.invoke(main, ["sample", shipped, "-o", str(tmp_path / "a.txt")]), "a.txt")
    one_sentence(runner.invoke(main, ["sample", shipped, "-o", str(tmp_path / "no" / "a.dcd")]), "no folder")
    one_sentence(runner.invoke(main, ["sample", str(tmp_path / "x.bg"), "-o", str(tmp_path / "a.dcd")]), "x.bg")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArtifactError):
        bg.load(tmp_path / "x.bg")


@pytest.mark.parametrize("name", ["train", "sample", "demo"])
def test_help_has_an_example(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0 and "Example:" in result.output and f"openmm-bg {name}" in result.output
