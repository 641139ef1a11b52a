"""`openmm-bg simulate` from a structure to training: complete, interrupted, killed, continued, made longer."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)
import yaml
from click.testing import CliRunner

import openmm_bg as bg
from openmm_bg.cli import main
from openmm_bg.errors import CheckpointError, EnergyError, InputError
from openmm_bg.free_energy import statistical_inefficiency
from openmm_bg.simulate import run as module
from openmm_bg.simulate.folder import locked, read_training_data
from openmm_bg.simulate.protocol import Protocol
from openmm_bg.simulate.run import simulate

import openmm  # isort: skip
from openmm import app  # isort: skip

#: Frames 20 fs apart, between which no atom moves far.
SHORT = Protocol(length=4.0, interval=0.02, replicas=2, heating=0.2, equilibration=0.4)
OPTIONS = ["--length", "0.004", "--interval", "0.02", "--replicas", "2", "--heating", "0.2", "--equilibration", "0.4"]
OPTIONS += ["--platform", "Reference"]
NAMES = ["test", "trajectory-1", "trajectory-2"]
# A shell starts background jobs with SIGINT ignored, and children inherit that.
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "import openmm_bg.simulate.run as r; r.CHECKPOINT_SECONDS = 0.05; from openmm_bg.cli import main; main()"
)


def frames(folder, name):
    """Frames [n, N, 3] nm by the file's own count."""
    return mdtraj.load_dcd(str(folder / f"{name}.dcd"), top=str(folder / "topology.pdb")).xyz


def consistent(folder, protocol=SHORT):
    """Every replica whole: as many frames as asked for, in order, none twice, none lost."""
    for name in protocol.names:
        xyz = frames(folder, name)
        rows = np.loadtxt(folder / f"{name}.csv", delimiter=",", skiprows=1)
        assert len(xyz) == len(rows) == protocol.frames
        assert np.allclose(rows[:, 0], protocol.interval * np.arange(1, protocol.frames + 1))
        with open(folder / f"{name}.dcd", "rb") as file:
            file.seek(8)
            assert int.from_bytes(file.read(4), "little") == protocol.frames
        centred = xyz - xyz.mean(axis=1, keepdims=True)
        step = np.sqrt(((centred[1:] - centred[:-1]) ** 2).sum(-1).mean(-1))
        assert step.min() > 1e-3, "a frame twice"
        assert step.max() < 4 * np.median(step), "a jump between frames"
    return True


def energies(folder, name):
    """Potential energies of the frames, and those that the .csv file has, kJ/mol."""
    system = openmm.XmlSerializer.deserialize((folder / "system.xml").read_text())
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    found = []
    for frame in frames(folder, name):
        context.setPositions(frame.astype(float))
        found.append(context.getState(energy=True).getPotentialEnergy()._value)
    return np.array(found), np.loadtxt(folder / f"{name}.csv", delimiter=",", skiprows=1)[:, 1]


@pytest.fixture(scope="module")
def finished(dipeptide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "md"
    result = CliRunner().invoke(main, ["simulate", str(dipeptide), "-o", str(folder), *OPTIONS])
    assert result.exit_code == 0, result.output
    assert f"{3 * SHORT.frames} frames in 3 trajectories" in result.output
    return folder


def test_the_folder(finished):
    assert consistent(finished)
    assert sorted(p.name for p in finished.iterdir()) == sorted(
        [".lock", "simulation.json", "system.xml", "topology.pdb"]
        + [f"{name}.{ending}" for name in NAMES for ending in ("dcd", "csv", "checkpoint.json")]
    )
    assert list(finished.parent.iterdir()) == [finished]
    record = json.loads((finished / "simulation.json").read_text())
    assert record["complete"] and record["protocol"]["temperature"] == 300.0
    assert any("equal, faster GBSAOBCForce" in note for note in record["notes"])


def test_the_system_is_the_one_that_ran(finished):
    system = openmm.XmlSerializer.deserialize((finished / "system.xml").read_text())
    assert system.getNumConstraints() == 12
    assert {type(f).__name__ for f in system.getForces()} >= {"GBSAOBCForce", "NonbondedForce"}
    for name in NAMES:
        ours, theirs = energies(finished, name)
        assert np.abs(ours - theirs).max() < 0.05  # single precision of positions in a DCD file
        xyz = frames(finished, name)
        for k in range(system.getNumConstraints()):
            i, j, length = system.getConstraintParameters(k)
            assert np.abs(np.linalg.norm(xyz[:, i] - xyz[:, j], axis=1) - length._value).max() < 1e-5


def test_replicas_differ(dipeptide, tmp_path):
    """In shape, not by tumbling: starts lie several times farther apart, superposed, than frames 20 fs apart."""
    protocol = Protocol(length=0.4, interval=0.02, replicas=3, heating=10.0, equilibration=5.0)
    simulate(dipeptide, tmp_path / "md", protocol, platform="Reference", progress=False)
    found = [mdtraj.Trajectory(frames(tmp_path / "md", name), None) for name in protocol.names]
    step = np.median([mdtraj.rmsd(t[k + 1], t[k])[0] for t in found for k in range(len(t) - 1)])
    for a, b in itertools.combinations(found, 2):
        assert mdtraj.rmsd(a[0], b[0])[0] > 2 * step
    turned = mdtraj.Trajectory(found[0].xyz[:1, :, [1, 2, 0]] + 1.0, None)  # a start that has tumbled, and nothing else
    assert mdtraj.rmsd(turned, found[0][0])[0] < 0.1 * step


def test_training_data_leave_the_test_alone(finished):
    data = read_training_data(finished)
    assert data.positions.shape == (2 * SHORT.frames, 22, 3) and data.temperature == 300.0
    expected = np.concatenate([frames(finished, name) for name in NAMES[1:]])
    assert np.abs(data.positions - expected).max() < 1e-6


def test_train_takes_the_folder(finished, tmp_path):
    config = {
        "batch_size": 64,
        "flow": {"n_backbone_blocks": 2, "n_joint_blocks": 2, "hidden": 16},
        "stages": [{"name": "likelihood", "losses": {"nll": 1.0}, "steps": 20, "learning_rate": 1e-3}],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    command = ["train", str(finished), "-o", str(tmp_path / "model"), "--config", str(tmp_path / "tiny.yaml")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    flow = bg.load(tmp_path / "model" / "flow.bg")
    assert flow.temperature == 300.0 and flow.metadata["training"]["frames"] == 2 * SHORT.frames
    assert openmm.XmlSerializer.serialize(flow.system) == (finished / "system.xml").read_text()
    result = CliRunner().invoke(main, [*command, "--temperature", "310"])
    assert result.exit_code == 1 and "leave out their options" in result.output
    result = CliRunner().invoke(main, ["train", str(tmp_path), "-o", str(tmp_path / "m2")])
    assert result.exit_code == 1 and "simulation.json" in result.output
    result = CliRunner().invoke(main, ["train", "-o", str(tmp_path / "m2")])
    assert result.exit_code == 1 and "Give a folder" in result.output


def launch(dipeptide, folder, *options):
    command = [sys.executable, "-c", START, "simulate", str(dipeptide), "-o", str(folder), *OPTIONS, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_frames(process, folder, n):
    """Until the replicas have saved n frames in all."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        saved = 0
        for path in folder.glob("*.checkpoint.json"):
            saved += json.loads(path.read_text())["frames"]
        if saved >= n:
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"not {n} frames in time: {process.communicate()[0]}")


def kept(folder):
    """Content of each DCD file as far as its checkpoint vouches for it."""
    found = {}
    for path in folder.glob("*.checkpoint.json"):
        name, checkpoint = path.name.split(".")[0], json.loads(path.read_text())
        found[name] = ((folder / f"{name}.dcd").read_bytes()[: checkpoint["dcd_bytes"]], checkpoint["frames"])
    return found


@pytest.mark.slow
def test_killed_and_continued(dipeptide, tmp_path):
    folder = tmp_path / "md"
    for round_, wanted in enumerate((40, 250)):
        process = launch(dipeptide, folder, *(["--resume"] if round_ else []))
        wait_for_frames(process, folder, wanted)
        process.kill()
        process.communicate()
        before = kept(folder)
        assert 0 < sum(n for _, n in before.values()) < 3 * SHORT.frames
        if round_:  # and a frame of which the disk has seen a part
            with open(folder / "test.dcd", "ab") as file:
                file.write(b"torn" * 30)
            with open(folder / "test.csv", "a") as file:
                file.write("9.9,-1")
        data = read_training_data(folder)
        assert len(data.positions) == sum(n for name, (_, n) in before.items() if name != "test")
    result = CliRunner().invoke(main, ["simulate", str(dipeptide), "-o", str(folder), *OPTIONS])
    assert result.exit_code == 1 and "--resume" in result.output
    result = CliRunner().invoke(main, ["simulate", str(dipeptide), "-o", str(folder), *OPTIONS, "--resume"])
    assert result.exit_code == 0, result.output
    assert consistent(folder)
    for name, (content, n) in before.items():
        after = (folder / f"{name}.dcd").read_bytes()
        assert n == 0 or after[276 : len(content)] == content[276:], "frames that were kept have changed"


@pytest.mark.slow
def test_interrupted_and_continued(dipeptide, tmp_path):
    folder = tmp_path / "md"
    process = launch(dipeptide, folder)
    wait_for_frames(process, folder, 40)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("Error: Interrupted with ")
    for name, (_, n) in kept(folder).items():
        assert n == 0 or len(frames(folder, name)) == n, "an orderly end leaves files whole"
    assert simulate(dipeptide, folder, SHORT, platform="Reference", resume=True, progress=False).frames == 600
    assert consistent(folder)


def test_made_longer(dipeptide, tmp_path):
    folder = tmp_path / "md"
    first = Protocol(**{**SHORT.to_dict(), "length": 1.0})
    simulate(dipeptide, folder, first, platform="Reference", progress=False)
    assert consistent(folder, first)
    before = kept(folder)
    simulate(dipeptide, folder, SHORT, platform="Reference", resume=True, progress=False)
    assert consistent(folder)
    for name, (content, _) in before.items():
        assert (folder / f"{name}.dcd").read_bytes()[276 : len(content)] == content[276:]


def test_continuing_something_else(finished, dipeptide, tail):
    def resume(structure=dipeptide, protocol=SHORT, **options):
        simulate(structure, finished, protocol, resume=True, progress=False, **options)

    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    with pytest.raises(InputError, match="another input file"):
        resume(tail)
    with pytest.raises(InputError, match=r"with temperature 300.0, not 310"):
        resume(protocol=Protocol(**{**SHORT.to_dict(), "temperature": 310.0}))
    with pytest.raises(InputError, match="solvent"):
        resume(solvent="none")
    if sys.platform != "win32":
        with locked(finished), pytest.raises(InputError, match="Another process"):
            resume()
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == before


def test_damaged_folders(finished, dipeptide, tmp_path):
    def damaged(name, change):
        folder = tmp_path / name.replace(".", "-")
        shutil.copytree(finished, folder)
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(CheckpointError, match=name.split(".")[0]) as caught:
            simulate(dipeptide, folder, SHORT, platform="Reference", resume=True, progress=False)
        assert str(caught.value).endswith(".")
        if "csv" not in name and name != "test.dcd":
            with pytest.raises(CheckpointError, match=name.split(".")[0]):
                read_training_data(folder)

    damaged("simulation.json", lambda b: b[:-20])
    damaged("system.xml", lambda b: b[:-200])
    damaged("topology.pdb", lambda b: b"")
    damaged("trajectory-1.checkpoint.json", lambda b: b[:-5])
    damaged("trajectory-2.dcd", lambda b: b[:-5])
    damaged("test.csv", lambda b: b[:-5])


def test_a_full_disk_keeps_what_there_is(dipeptide, tmp_path, monkeypatch):
    folder = tmp_path / "md"
    write, count = app.DCDFile.writeModel, iter(range(10**6))

    def full(self, *arguments, **options):
        if next(count) >= 50:
            self._file.write(b"half a frame")
            raise OSError(28, "No space left on device")
        write(self, *arguments, **options)

    monkeypatch.setattr(app.DCDFile, "writeModel", full)
    with pytest.raises(CheckpointError, match=r"No space left.*--resume"):
        simulate(dipeptide, folder, SHORT, platform="Reference", progress=False)
    monkeypatch.undo()
    assert sum(n for _, n in kept(folder).values()) >= 50 - 1
    simulate(dipeptide, folder, SHORT, platform="Reference", resume=True, progress=False)
    assert consistent(folder)


def test_an_unstable_simulation_says_so(dipeptide, tmp_path, monkeypatch):
    monkeypatch.setattr(Protocol, "__post_init__", lambda self: None)
    wild = Protocol(**{**SHORT.to_dict(), "time_step": 0.02, "interval": 0.2, "heating": 4.0, "friction": 0.01})
    with pytest.raises(EnergyError, match=r"unstable within its first steps.*shorten the time step"):
        simulate(dipeptide, tmp_path / "md", wild, platform="Reference", progress=False)
    assert list(tmp_path.iterdir()) == []
    # Past these first steps: frames stay, and the message counts them.
    monkeypatch.undo()
    real, calls = openmm.State.getKineticEnergy, iter(range(10**6))

    def kinetic(self):
        return real(self) * (1.0 if next(calls) <= 10 else np.nan)

    monkeypatch.setattr(openmm.State, "getKineticEnergy", kinetic)
    one = Protocol(**{**SHORT.to_dict(), "replicas": 1, "test": False})
    with pytest.raises(EnergyError, match="trajectory-1 became unstable after 10 frames"):
        simulate(dipeptide, tmp_path / "md", one, platform="Reference", progress=False)
    monkeypatch.undo()
    assert kept(tmp_path / "md")["trajectory-1"][1] == 10 and len(frames(tmp_path / "md", "trajectory-1")) == 10


def test_a_worker_that_cannot_start_ends_the_run(dipeptide, tmp_path, monkeypatch):
    """Whatever a thread dies of, the main one hears of it instead of waiting for ever."""
    monkeypatch.setattr(Protocol, "__post_init__", lambda self: None)
    one = Protocol(**{**SHORT.to_dict(), "replicas": 1, "test": False, "seed": -1})  # no random stream takes it
    caught = []

    def run():
        try:
            simulate(dipeptide, tmp_path / "md", one, platform="Reference", progress=False)
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(120.0)
    assert caught and not thread.is_alive()


def test_a_start_that_loses_its_chirality_is_refused(dipeptide, tmp_path, monkeypatch):
    monkeypatch.setattr(module.Stereochemistry, "difference", lambda self, x: module_answer.pop(0))
    module_answer = [None, *["the chirality at ALA2-CA"] * 4]
    with pytest.raises(EnergyError, match=r"4 starts of .* the chirality at ALA2-CA .* --start-temperature"):
        simulate(
            dipeptide, tmp_path / "md", Protocol(**{**SHORT.to_dict(), "replicas": 1, "test": False}),
            platform="Reference", progress=False,
        )  # fmt: skip


def test_another_solvent_stays_and_is_named(dipeptide, tmp_path, caplog):
    brief = Protocol(length=0.1, interval=0.02, replicas=1, test=False, heating=0.02, equilibration=0.02)
    with caplog.at_level("INFO", "openmm_bg"):
        simulate(
            dipeptide, tmp_path / "md", brief, forcefield=["amber14-all.xml", "implicit/obc1.xml"],
            platform="Reference", progress=False,
        )  # fmt: skip
    assert "The CustomGBForce stays" in caplog.text and "Born radius" in caplog.text
    system = openmm.XmlSerializer.deserialize((tmp_path / "md" / "system.xml").read_text())
    assert any(isinstance(f, openmm.CustomGBForce) for f in system.getForces())


@pytest.mark.statistical
def test_the_temperature_is_the_thermostats(dipeptide, tmp_path):
    protocol = Protocol(length=80.0, interval=0.4, replicas=1, test=False, heating=1.0, equilibration=5.0, seed=1)
    simulate(dipeptide, tmp_path / "md", protocol, platform="Reference", progress=False)
    kelvin = np.loadtxt(tmp_path / "md" / "trajectory-1.csv", delimiter=",", skiprows=1)[:, 2]
    error = kelvin.std() * np.sqrt(statistical_inefficiency(kelvin) / len(kelvin))
    print(kelvin.mean(), error)
    assert abs(kelvin.mean() - 300.0) < 4 * error
    # Degrees of freedom that forget the 12 constraints are noticed.
    assert abs(kelvin.mean() * 51 / 63 - 300.0) > 5 * error


def test_four_femtoseconds(dipeptide, tmp_path):
    folder = Path(tmp_path / "md")
    options = ["--length", "0.0002", "--interval", "0.04", "--replicas", "1", "--no-test", "--heating", "0.2"]
    options += ["--equilibration", "0.4", "--hmr", "--platform", "CPU"]
    result = CliRunner().invoke(main, ["simulate", str(dipeptide), "-o", str(folder), *options])
    assert result.exit_code == 0, result.output
    system = openmm.XmlSerializer.deserialize((folder / "system.xml").read_text())
    assert min(system.getParticleMass(i)._value for i in range(22)) == pytest.approx(3.0)
    record = json.loads((folder / "simulation.json").read_text())
    assert record["protocol"]["time_step"] == 0.004 and record["engine"]["platform"] == "CPU"


def test_two_replicas_beside_each_other(dipeptide, tmp_path, monkeypatch):
    cores = sorted(module.engines.usable_cores())[:1] * 2  # two threads on one core: slower, and as right
    monkeypatch.setattr(module.engines, "usable_cores", lambda: cores)
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.05)
    simulate(dipeptide, tmp_path / "md", SHORT, platform="Reference", progress=False)
    assert json.loads((tmp_path / "md" / "simulation.json").read_text())["engine"]["workers"] == 2
    assert consistent(tmp_path / "md")
