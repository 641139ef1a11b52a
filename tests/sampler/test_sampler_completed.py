"""Formula C on butane: a `reduced` flow with a completion has the averages of MD, without it it does not."""

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.analysis.quality import forward_figures, frame_log_weights
from openmm_bg.artifact import Flow
from openmm_bg.errors import ArtifactError, InputError
from openmm_bg.free_energy import bar, one_sided, statistical_inefficiency
from openmm_bg.weights import expectation

import openmm  # isort: skip

REFERENCE = openmm.Platform.getPlatformByName("Reference")
KT = 8.31446261815324e-3 * 300.0
N = 20_000
CONFIG = {
    "batch_size": 256,
    "ema_decay": 0.98,
    "flow": {"n_backbone_blocks": 0, "n_joint_blocks": 4, "hidden": 24},
    "stages": [{"name": "likelihood", "losses": {"nll": 1.0}, "steps": 250, "learning_rate": 5e-3}],
}


class Butane:
    """System, a flow trained on MD frames, and other frames [n, 14, 3] with their u [n] and log w [n]."""

    def __init__(self, folder):
        path = Path(__file__).parents[1] / "integration" / "test_own_molecule.py"
        spec = importlib.util.spec_from_file_location("openmm_bg_test_butane_for_sampler", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.topology, self.system, positions = module.butane()
        # Low barriers: MD must cross them often enough for its own error bars to be true.
        torsions = next(f for f in self.system.getForces() if isinstance(f, openmm.PeriodicTorsionForce))
        for k in range(torsions.getNumTorsions()):
            *atoms, fold, phase, height = torsions.getTorsionParameters(k)
            torsions.setTorsionParameters(k, *atoms, fold, phase, height if fold == 1 else 0.2 * height)
        self.start = positions
        training, _ = self.md(10_000, seed=1)
        # The reference is a run of its own: log g of the frames that g was fitted to is too high.
        self.frames, self.reduced = self.md(20_000, seed=3)
        self.flow = bg.train(
            self.system,
            self.topology,
            training,
            300.0,
            representation="reduced",
            config=CONFIG,
            platform="Reference",
            n_workers=1,
            progress=False,
        )
        self.path = folder / "butane.bg"
        self.flow.save(self.path)
        with self.sampler() as sampler:
            self.log_w, self.sector = frame_log_weights(sampler.flow, sampler.coordinates, sampler.target, self.frames)

    def md(self, n, seed):
        """Frames [n, 14, 3] and reduced energies [n]."""
        context = self.context(self.start, seed=seed)
        openmm.LocalEnergyMinimizer.minimize(context)
        context.setVelocitiesToTemperature(300.0, seed)
        context.getIntegrator().step(4000)
        frames, energies = [], []
        for _ in range(n):
            context.getIntegrator().step(40)
            state = context.getState(positions=True, energy=True)
            frames.append(state.getPositions(asNumpy=True)._value)
            energies.append(state.getPotentialEnergy()._value / KT)
        return np.array(frames), np.array(energies)

    def context(self, positions=None, seed=2, system=None):
        # A high friction decorrelates the energy; a free C-C bond of this stiffness bears 1 fs well.
        integrator = openmm.LangevinMiddleIntegrator(300.0, 10.0, 0.001)
        integrator.setRandomNumberSeed(seed)
        context = openmm.Context(self.system if system is None else system, integrator, REFERENCE)
        context.setPositions(self.frames[-1] if positions is None else positions)
        return context

    def sampler(self, flow=None, **options):
        options = {"seed": 1, "platform": "Reference", "n_workers": 1, **options}
        context = options.pop("context", None) or self.context()
        return bg.BoltzmannGeneratorSampler(flow or self.flow, context, 300.0, **options)


@pytest.fixture(scope="module")
def butane(tmp_path_factory):
    return Butane(tmp_path_factory.mktemp("butane"))


@pytest.fixture(scope="module")
def completed(butane):
    """Samples of formula C."""
    with butane.sampler() as sampler:
        return sampler.sample(N)


@pytest.fixture(scope="module")
def rigid(butane):
    """Samples of formula B, of the same flow."""
    with butane.sampler() as sampler:
        return sampler.sample(N, completion=False)


def observables(butane, x, u, log_w):
    """[n, k]: energy, gauche, mean and spread of an angle C-C-H, a length C-C and an angle C-C-C; log J + Φ, log w."""

    def angle(i, j, k):
        a, b = x[:, i] - x[:, j], x[:, k] - x[:, j]
        return np.arccos((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))

    axis, first, last = x[:, 2] - x[:, 1], x[:, 0] - x[:, 1], x[:, 3] - x[:, 2]
    one, two = np.cross(first, axis), np.cross(last, axis)
    cosine = (one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1)
    stiff = angle(1, 0, 4)
    length = np.linalg.norm(axis, axis=-1)
    volume = butane.flow.coordinates.log_volume(*butane.flow.to_internal(x)).numpy()
    columns = (
        u, cosine > 0.0, stiff, (stiff - 1.9) ** 2, length, (length - 0.153) ** 2, angle(0, 1, 2), volume, log_w
    )  # fmt: skip
    return np.stack(columns, -1).astype(float)


NAMES = ["energy", "gauche", "angle", "angle²", "length", "length²", "C-C-C", "volume", "log w"]


def deviations(butane, ensemble, log_w=None):
    """|z| of every observable: weighted averages against MD, errors of both."""
    log_w = ensemble.log_weights if log_w is None else log_w
    columns = observables(butane, ensemble.positions, ensemble.reduced_potentials, ensemble.log_weights)
    value, error = expectation(columns, log_w)
    md = observables(butane, butane.frames, butane.reduced, butane.log_w)
    noise = np.array([np.sqrt(statistical_inefficiency(c) * c.var() / len(c)) for c in md.T])
    z = np.abs(value - md.mean(0)) / np.hypot(error, noise)
    for name, *row in zip(NAMES, value, error, md.mean(0), noise, z, strict=True):
        print(name, "flow {:.5g} +- {:.2g}, MD {:.5g} +- {:.2g}, z = {:.1f}".format(*row))
    return dict(zip(NAMES, z, strict=True))


# -------------------------------------------------------------------- the weights


def test_weights_are_formula_c(butane, completed):
    assert completed.label == "exact" and completed.n == N
    x = completed.positions[:50]
    context = butane.context()
    u = []
    for frame in x:
        context.setPositions(frame)
        u.append(context.getState(energy=True).getPotentialEnergy()._value / KT)
    np.testing.assert_allclose(completed.reduced_potentials[:50], u, atol=1e-6)
    log_p = butane.flow.log_prob_positions(x).numpy()
    np.testing.assert_allclose(completed.log_q[:50], log_p, atol=2e-3)  # networks in float32
    volume = butane.flow.coordinates.log_volume(*butane.flow.to_internal(x)).numpy()
    np.testing.assert_allclose(completed.log_weights[:50], volume - np.array(u) - completed.log_q[:50], atol=1e-6)
    y, s = butane.flow.to_internal(x)
    spread = s.std(0).numpy()
    constrained = [c.constrained for c in butane.flow.coordinates.coordinates if not c.modelled]
    assert spread[constrained].max() < 1e-9 < 1e-4 < spread[~np.array(constrained)].min()
    log_g = (butane.flow.joint_log_prob(y, s) - butane.flow.log_prob(y)).detach()
    assert float(log_g.std()) > 1.0  # what is left out below is no constant


def test_label_and_option(butane, completed, rigid):
    assert rigid.label == "rigid" and rigid.ess > completed.ess > 0.2
    s = butane.flow.to_internal(rigid.positions[:20])[1]
    np.testing.assert_allclose(s.numpy(), butane.flow.coordinates.reference_fixed.expand(20, -1).numpy(), atol=1e-8)
    with butane.sampler(seed=8) as sampler:
        first = sampler.sample(30, completion=True)
    with butane.sampler(seed=8) as sampler:
        second = sampler.sample(30)
        assert sampler.step(20)["n_proposed"] == 20  # formula D keeps s
    np.testing.assert_array_equal(first.log_weights, second.log_weights)
    bare = Flow(butane.flow.density, butane.flow.coordinates, butane.flow.metadata)
    with butane.sampler(bare) as sampler:
        assert sampler.sample(5).label == "rigid"
        with pytest.raises(InputError, match="no completion"):
            sampler.sample(5, completion=True)


@pytest.mark.statistical
def test_averages_are_those_of_md(butane, completed):
    z = deviations(butane, completed)
    assert max(z.values()) < 4.0 and completed.trustworthy


@pytest.mark.statistical
def test_rigid_averages_are_not(butane, rigid):
    z = deviations(butane, rigid)
    assert z["energy"] > 5.0 and z["angle²"] > 5.0 and z["length²"] > 5.0


@pytest.mark.statistical
@pytest.mark.parametrize("broken", ["log g", "volume", "log q", "factor 2"])
def test_broken_weights_are_caught(butane, completed, broken):
    y, s = butane.flow.to_internal(completed.positions)
    with torch.no_grad():
        log_q = butane.flow.log_prob(y).numpy()
    log_w = completed.log_weights
    log_w = {
        "log g": log_w + (completed.log_q - log_q),
        "volume": log_w - butane.flow.coordinates.log_volume(y, s).numpy(),
        "log q": log_w + log_q,
        "factor 2": 2 * log_w,
    }[broken]
    assert max(deviations(butane, completed, log_w).values()) > 5.0


# -------------------------------------------------------------------- MD frames: formula J


@pytest.mark.statistical
def test_bar_with_md_frames(butane, completed):
    rows = slice(None, None, int(np.ceil(statistical_inefficiency(butane.log_w))))
    log_w, volume = (
        butane.log_w[rows],
        butane.flow.coordinates.log_volume(*butane.flow.to_internal(butane.frames[rows])),
    )
    result, single = bar(completed.log_weights, log_w), one_sided(completed.log_weights)
    error = np.hypot(result.error, single.error)
    print(result, single, (result.delta_f - single.delta_f) / error, "n", len(log_w))
    assert butane.sector.all() and abs(result.delta_f - single.delta_f) < 4.0 * error and result.overlap > 0.1
    assert forward_figures(log_w, butane.sector[rows])["forward_ess"] == pytest.approx(completed.ess, abs=0.2)
    # log J + Φ left out on both sides
    y, s = butane.flow.to_internal(completed.positions)
    without = completed.log_weights - butane.flow.coordinates.log_volume(y, s).numpy()
    broken = bar(without, log_w - volume.numpy())
    assert abs(broken.delta_f - single.delta_f) > 5.0 * np.hypot(broken.error, single.error)
    # log g left out for the frames, which is all that a `reduced` flow alone could offer: nothing overlaps
    y, s = butane.flow.to_internal(butane.frames[rows])
    with torch.no_grad():
        wrong = log_w + (butane.flow.joint_log_prob(y, s) - butane.flow.log_prob(y)).numpy()
    assert bar(completed.log_weights, wrong).overlap < 0.01


def test_frames_outside_have_no_density(butane):
    mirrored = butane.frames[:3].copy()
    mirrored[1] *= -1.0  # butane is its own mirror image, its offsets are not
    log_p = butane.flow.log_prob_positions(mirrored)
    assert torch.isneginf(log_p[1]) and bool(torch.isfinite(log_p[[0, 2]]).all())


# -------------------------------------------------------------------- the artifact


def test_the_file_holds_the_completion(butane, completed):
    loaded = bg.load(butane.path, topology=butane.topology)
    assert loaded.is_complete and loaded.metadata["completion"] == {"coordinates": 21}
    assert "5 modelled coordinates, 21 completed" in repr(loaded)
    y, s = loaded.to_internal(completed.positions[:20])
    assert torch.allclose(loaded.joint_log_prob(y, s), butane.flow.joint_log_prob(y, s), atol=1e-3)
    again = butane.path.with_name("again.bg")
    loaded.save(again)
    with butane.sampler(bg.load(again)) as sampler:
        ensemble = sampler.sample(20)
    np.testing.assert_allclose(ensemble.log_weights, completed.log_weights[:20], atol=5.0)  # other chunks, other draws
    assert ensemble.label == "exact"


def test_plain_torchscript_still_offers_y(butane):
    code = textwrap.dedent(f"""
        import io, json, sys, torch
        extra = {{"metadata.json": "", "completion.pt": ""}}
        flow = torch.jit.load({str(butane.path)!r}, _extra_files=extra)
        y, log_q = flow.sample(7)
        z, _ = flow.inverse(y)
        assert y.shape == (7, 5) and flow(z)[0].shape == (7, 5)
        assert torch.allclose(flow.log_prob(y), log_q, atol=1e-4)
        assert json.loads(extra["metadata.json"])["completion"]["coordinates"] == 21
        completion = torch.jit.load(io.BytesIO(extra["completion.pt"]))
        s, log_g = completion.sample(y)
        assert s.shape == (7, 21) and torch.allclose(completion.log_prob(s, y), log_g, atol=1e-3)
        assert "openmm_bg" not in sys.modules and "openmm" not in sys.modules
    """)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript's own
def test_files_that_disagree_are_refused(butane, tmp_path):
    extra = {"metadata.json": "", "completion.pt": ""}
    density = torch.jit.load(str(butane.path), _extra_files=extra)
    path = tmp_path / "bad.bg"
    torch.jit.save(density, str(path), _extra_files={"metadata.json": extra["metadata.json"]})
    with pytest.raises(ArtifactError, match="disagree about the completion"):
        bg.load(path)
    metadata = json.loads(extra["metadata.json"]) | {"completion": None}
    torch.jit.save(density, str(path), _extra_files=extra | {"metadata.json": json.dumps(metadata)})
    with pytest.raises(ArtifactError, match="disagree about the completion"):
        bg.load(path)
    torch.jit.save(density, str(path), _extra_files=extra | {"completion.pt": b"text"})
    with pytest.raises(ArtifactError, match="not a readable TorchScript file"):
        bg.load(path)
    with pytest.raises(InputError, match="covers 21 coordinates"):
        shipped = bg.load_alanine_dipeptide().flow
        Flow(shipped.density, shipped.coordinates, shipped.metadata, butane.flow.completion)


# -------------------------------------------------------------------- what it cannot cover


def test_freed_lengths_are_refused_as_ever(butane):
    free = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(butane.system))
    a, b, length = free.getConstraintParameters(0)
    free.removeConstraint(0)
    next(f for f in free.getForces() if isinstance(f, openmm.HarmonicBondForce)).addBond(a, b, length, 284512.0)
    with butane.sampler(context=butane.context(system=free)) as sampler:
        for choice in (None, True, False):
            with pytest.raises(InputError, match="1 bond lengths fixed"):
                sampler.sample(4, completion=choice)


def test_a_flow_without_completion_says_so(butane):
    bare = Flow(butane.flow.density, butane.flow.coordinates, butane.flow.metadata)
    assert not bare.is_complete and "completed" not in repr(bare)
    y, s = bare.to_internal(butane.frames[:2])
    for call in (
        lambda: bare.complete(y),
        lambda: bare.joint_log_prob(y, s),
        lambda: bare.log_prob_positions(butane.frames[:2]),
    ):
        with pytest.raises(InputError, match="21 of its coordinates") as error:
            call()
        assert "\n" not in str(error.value)
    full = bg.load_alanine_dipeptide()
    assert full.flow.is_complete
    y, s = full.flow.to_internal(full.positions)
    assert torch.equal(full.flow.joint_log_prob(y, s), full.flow.log_prob(y))
    completed, log_g = full.flow.complete(y)
    assert torch.equal(completed[0], full.flow.coordinates.reference_fixed) and float(log_g) == 0.0
