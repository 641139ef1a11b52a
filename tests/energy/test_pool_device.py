"""A pool whose twin is on a GPU, of which there need not be one: the CPU takes its place, or the device ``meta``.

The CPU has numbers, to compare; ``meta`` has none, and any look at one would be an error.
"""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest
import torch

from openmm_bg.energy import (
    ContextPool,
    SystemTwin,
    Target,
    reduced_energy,
    thermal_energy,
    tune,
    tuning,
    twin_workers,
)
from openmm_bg.energy import pool as pool_module
from openmm_bg.energy.snapshot import read_state
from openmm_bg.energy.twin import twin as twin_module
from openmm_bg.energy.twin.evaluator import Evaluator
from openmm_bg.energy.twin.system import Forces
from openmm_bg.errors import EnergyError, InputError

import openmm  # isort: skip

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
META = torch.device("meta")
GPU = "twin:cuda"

#: Frames of the particles of `context`.
N = 5
K = np.arange(N)
FRAMES = np.stack((0.12 * K, 0.1 * (K % 2), 0.03 * (K % 3)), axis=1)
FRAMES = FRAMES + np.random.default_rng(5).normal(scale=0.01, size=(7, N, 3))
BAD = [1, 4]


def bad_frames() -> np.ndarray:
    """One frame without a position, and one whose atoms 0 and 2 are on one spot."""
    frames = FRAMES.copy()
    frames[1, 3, 2] = np.nan
    frames[4, 0] = frames[4, 2]
    return frames


@pytest.fixture
def pool(request, monkeypatch, gpu, context):
    """A pool with its twin on the device, its loops in torch, or (`in_both`) in Triton's interpreter, which is slow."""
    backend = getattr(request, "param", "torch")
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(twin_module, "backend_for", lambda device, compile: "triton")
    with ContextPool(context, platform=GPU, n_workers=3) as pool:
        assert pool._workers.twin.backend == backend
        yield pool


in_both = pytest.mark.parametrize("pool", ["torch", "triton"], indirect=True)


@pytest.fixture
def contexts(context):
    with ContextPool(context, platform="Reference", n_workers=1) as pool:
        yield pool


def no_host(monkeypatch):
    """From now on, evaluation by way of numpy is an error."""

    def refuse(*_, **__):
        raise AssertionError("by way of numpy")

    monkeypatch.setattr(pool_module, "as_frames", refuse)
    monkeypatch.setattr(twin_module, "as_frames", refuse)


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "compiled" not in r.getMessage()]


# ------------------------------------------------------------------------------------------------ the same numbers


@in_both
def test_the_same_numbers_on_the_device_and_by_way_of_the_host(pool, contexts, monkeypatch):
    assert (pool.platform, pool.n_workers, pool.processes, pool.tuning) == (GPU, 1, False, None)
    expected, expected_forces = contexts.energies_and_forces(FRAMES)
    assert np.ptp(expected) > 1.0
    energies, forces = pool.energies_and_forces(FRAMES)
    np.testing.assert_allclose(energies, expected, rtol=1e-11)
    np.testing.assert_allclose(forces, expected_forces, rtol=1e-9, atol=1e-8)
    no_host(monkeypatch)
    found, found_forces = pool.evaluate_on_device(torch.tensor(FRAMES))
    only, none = pool.evaluate_on_device(torch.tensor(FRAMES), forces=False)
    assert none is None and found.dtype == found_forces.dtype == torch.float64 and not found.requires_grad
    np.testing.assert_allclose(found, energies, rtol=1e-13)
    np.testing.assert_allclose(only, energies, rtol=1e-13)
    np.testing.assert_allclose(found_forces, forces, rtol=1e-11, atol=1e-10)
    assert pool.evaluate_on_device(torch.zeros(0, N, 3))[0].shape == (0,)
    assert (pool.n_energies, pool.n_nonfinite) == (3 * len(FRAMES), 0)


def test_any_pool_can_be_asked_for_tensors(contexts, monkeypatch):
    energies, forces = contexts.energies_and_forces(bad_frames())
    found, found_forces = contexts.evaluate_on_device(torch.tensor(bad_frames(), requires_grad=True))
    assert not found.requires_grad
    np.testing.assert_array_equal(found, energies)
    np.testing.assert_array_equal(found_forces, forces)
    assert contexts.evaluate_on_device(torch.tensor(FRAMES), forces=False)[1] is None
    assert contexts.n_energies == 2 * (len(FRAMES) - 1) + len(FRAMES)
    no_host(monkeypatch)
    with pytest.raises(AssertionError, match="numpy"):
        contexts.evaluate_on_device(torch.tensor(FRAMES))


def test_counts_are_those_of_the_host(pool):
    for evaluate in (pool.energies_and_forces, lambda x: pool.evaluate_on_device(torch.tensor(x))):
        pool.n_energies = pool.n_nonfinite = 0
        evaluate(bad_frames())
        evaluate(FRAMES[:2])
        assert (pool.n_energies, pool.n_nonfinite) == (len(FRAMES) - 1 + 2, 2)
        assert type(pool.n_energies) is int
    pool.evaluate_on_device(torch.tensor(bad_frames()))
    pool.n_energies += 1  # with counts still on the device
    assert (pool.n_energies, pool.n_nonfinite) == (len(FRAMES) - 1 + 2 + len(FRAMES) - 1 + 1, 4)
    pool.evaluate_on_device(torch.tensor(FRAMES))
    pool.sync()
    pool.evaluate_on_device(torch.full((2, N, 3), 1e200, dtype=torch.float64))
    assert (pool.n_energies, pool.n_nonfinite) == (3 * len(FRAMES) + 1, 6)


@in_both
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_reduced_energies_and_their_gradients(pool, contexts, monkeypatch, given):
    x = torch.tensor(bad_frames(), dtype=given, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    weight = torch.linspace(-1.0, 2.0, len(x), dtype=torch.float64)
    weight[BAD] = torch.inf  # as what is made of an infinite energy may send back
    u = reduced_energy(x, contexts, 350)
    (u * weight).sum().backward()
    good = [row for row in range(len(x)) if row not in BAD]
    slopes = -contexts.energies_and_forces(x)[1][good] / thermal_energy(350)
    expected = weight[good, None, None] * torch.from_numpy(slopes)
    no_host(monkeypatch)
    found = reduced_energy(twin_x, pool, 350)
    assert found.dtype == torch.float64 and found.device == twin_x.device
    assert torch.isposinf(found[BAD]).all() and torch.isfinite(found).sum() == len(x) - 2
    torch.testing.assert_close(found, u, rtol=1e-11, atol=0.0)
    (found * weight).sum().backward()
    assert twin_x.grad.dtype == given and (twin_x.grad[BAD] == 0).all()
    torch.testing.assert_close(twin_x.grad, x.grad, rtol=1e-9 if given == torch.float64 else 1e-5, atol=1e-6)
    torch.testing.assert_close(twin_x.grad[good], expected.to(given), rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 1.0
    quiet = reduced_energy(twin_x.detach(), pool, 350)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, u, rtol=1e-11, atol=0.0)
    assert (pool.n_energies, pool.n_nonfinite) == (2 * (len(x) - 1), 4)


def test_a_reduced_energy_that_went_wrong_would_be_noticed(pool, contexts, monkeypatch):
    """Forces for gradients: the sign that OpenMM does not have."""
    plain = pool.evaluate_on_device
    monkeypatch.setattr(pool, "evaluate_on_device", lambda x: (plain(x)[0], -plain(x)[1]))
    x, y = (torch.tensor(FRAMES, requires_grad=True) for _ in range(2))
    reduced_energy(x, contexts, 350).sum().backward()
    reduced_energy(y, pool, 350).sum().backward()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-9, atol=1e-6)


def test_single_precision_positions_are_not_rounded_again(pool):
    """The same positions have the same energy, given to the device or to the host."""
    single = torch.tensor(FRAMES, dtype=torch.float32)
    expected = pool.energies(single)
    np.testing.assert_allclose(pool.evaluate_on_device(single)[0], expected, rtol=1e-12)
    direct, _ = pool._workers.twin.evaluate(single)  # moved to the origin in single precision
    assert np.abs(direct.numpy() / expected - 1.0).max() > 1e-9


@pytest.mark.parametrize("kind", [torch.complex64, torch.complex128])
def test_complex_positions_are_refused_and_not_made_real(pool, contexts, kind):
    x = torch.tensor(FRAMES).to(kind)
    for source in (pool, contexts):
        calls = [source.evaluate_on_device, source.energies, lambda x, source=source: reduced_energy(x, source, 350),
                 lambda x, source=source: reduced_energy(x.requires_grad_(), source, 350)]  # fmt: skip
        for call in calls:
            with pytest.raises(InputError, match=r"real numbers of shape \[B, \d+, 3\], not complex"):
                call(x.detach())
    for call in (pool._workers.twin.evaluate_on_device, pool._workers.twin.energies, pool._workers.twin.evaluate):
        with pytest.raises(InputError, match=r"real numbers of shape \[B, \d+, 3\], not complex"):
            call(x)
    with pytest.raises(InputError, match="must be a torch tensor, not ndarray"):
        contexts.evaluate_on_device(FRAMES)
    assert pool.n_energies == pool.n_nonfinite == contexts.n_energies == 0


def test_a_target_on_the_device(pool, contexts, monkeypatch):
    class Shift:
        """x = y as it is, with a domain and a volume."""

        def to_positions(self, y, s):
            return y.reshape(-1, N, 3)

        def log_volume(self, y, s):
            return y.sum(dim=1)

        def in_domain(self, y, s):
            return y[:, 0] < 0.5

    y = torch.tensor(bad_frames().reshape(len(FRAMES), -1))
    y[0, 0] = 0.6
    s = torch.zeros(len(y), 1)
    expected = Target(Shift(), contexts, 350).log_density(y, s)
    no_host(monkeypatch)
    found, x = Target(Shift(), pool, 350).log_density_and_positions(y, s)
    assert torch.isneginf(found[[0, *BAD]]).all() and torch.isfinite(found).sum() == len(y) - 3
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0.0)
    assert torch.isnan(x[0]).all()
    # The domain is decided first, and a row of NaN is in no domain.
    assert (pool.n_energies, pool.n_nonfinite) == (len(y) - 2, 1)


# ------------------------------------------------------------------------------------------------ nothing waits


@pytest.fixture
def on_meta(gpu, context):
    """A pool whose twin has arrays without numbers, made from one on the CPU, for it cannot be compared with OpenMM."""
    with ContextPool(context, platform=GPU) as pool:
        twin = pool._workers.twin
        twin.device, twin._counts = META, torch.zeros(2, dtype=torch.int64, device=META)
        twin._evaluator = Evaluator(Forces(context.getSystem()), twin.dtype, META)
        twin._evaluator.prepare(twin.parameters)
        yield pool


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_reduced_energies_stay_on_the_device_and_nothing_waits_for_it(on_meta, given):
    x = torch.zeros((9, N, 3), dtype=given, device=META, requires_grad=True)
    for _ in range(2):
        u = reduced_energy(x, on_meta, 300)
        assert (u.device, u.dtype, u.shape) == (META, torch.float64, (9,))
        u.sum().backward()
        assert x.grad.device == META and x.grad.shape == x.shape and x.grad.dtype == given
        assert reduced_energy(x.detach(), on_meta, 300).device == META
    with pytest.raises(RuntimeError):
        _ = on_meta.n_energies  # which waits


@pytest.mark.parametrize("wrong", ["a look at a number", "numpy"])
def test_a_reduced_energy_that_waits_would_be_noticed(on_meta, monkeypatch, wrong):
    plain = twin_workers.TwinWorkers.evaluate_on_device

    def look(self, positions, *, forces):
        found = plain(self, positions, forces=forces)
        if wrong == "numpy":
            found[0].cpu().numpy()
        elif torch.isfinite(found[0]).all():
            pass
        return found

    monkeypatch.setattr(twin_workers.TwinWorkers, "evaluate_on_device", look)
    with pytest.raises((RuntimeError, NotImplementedError)):
        reduced_energy(torch.zeros((9, N, 3), device=META), on_meta, 300)


def test_what_is_elsewhere_comes_by_way_of_the_host(gpu, context):
    with ContextPool(context, platform=GPU) as pool:
        assert pool._workers.holds(torch.zeros(1, N, 3))
        assert not pool._workers.holds(torch.zeros(1, N, 3, device=META))
    with ContextPool(context, platform="twin", n_workers=1) as pool:
        assert not pool._workers.holds(torch.zeros(1, N, 3))  # one on the CPU has threads and chunks, by numpy


# ------------------------------------------------------------------------------------------------ a pool like any other


def test_sync_follows_the_context(pool, context):
    before = pool.evaluate_on_device(torch.tensor(FRAMES))[0]
    r = np.linalg.norm(FRAMES[:, 0] - FRAMES[:, 1], axis=1)
    context.setParameter("k", 400.0)
    pool.sync()
    gain = pool.evaluate_on_device(torch.tensor(FRAMES))[0] - before
    np.testing.assert_allclose(gain, 300.0 * (r - 0.1) ** 2, rtol=1e-9, atol=1e-10)
    spring = context.getSystem().getForce(2)
    spring.setEnergyFunction("2*k*(r-0.1)^2")
    context.reinitialize(preserveState=True)
    old = pool._workers
    pool.sync()
    assert pool._workers is not old and pool.platform == GPU and pool._workers.on_gpu
    assert pool._counts_there is None and pool.n_energies == 2 * len(FRAMES)
    gain = pool.evaluate_on_device(torch.tensor(FRAMES))[0] - before
    np.testing.assert_allclose(gain, 700.0 * (r - 0.1) ** 2, rtol=1e-9, atol=1e-10)


def test_closed_forked_and_misshapen(gpu, context, monkeypatch):
    pool = ContextPool(context, platform=GPU)
    with pytest.raises(InputError, match=r"\[B, 5, 3\]"):
        pool.evaluate_on_device(torch.zeros(2, 4, 3))
    with monkeypatch.context() as other:
        other.setattr(twin_workers.os, "getpid", lambda: -1)
        with pytest.raises(EnergyError, match="fork"):
            pool.evaluate_on_device(torch.tensor(FRAMES))
    pool.close()
    with pytest.raises(EnergyError, match="closed"):
        pool.evaluate_on_device(torch.tensor(FRAMES))


def test_a_twin_in_single_precision_would_be_refused(gpu, make_context, dipeptide, caplog, monkeypatch):
    """A pool holds it to double precision where the Context has it; that in use is right to much less than that."""

    def single(*arguments, **options):
        return SystemTwin(*arguments, **(options | {"dtype": torch.float32}))

    with ContextPool(make_context(), platform=GPU) as pool:
        assert pool.platform == GPU and pool._workers.twin.dtype == torch.float64
        assert pool._evaluate_state(pool._workers, read_state(pool.context))[1] < 1e-5  # kJ/mol
    monkeypatch.setattr(twin_workers, "SystemTwin", single)
    with ContextPool(make_context(), platform=GPU, n_workers=1) as pool:
        assert pool.platform in PLATFORMS
    assert [m for m in warnings_of(caplog) if "differs from the Context by" in m]


# ------------------------------------------------------------------------------------------------ where it cannot be


def test_without_a_gpu_its_name_is_refused(context, monkeypatch):
    monkeypatch.setattr(twin_workers, "gpu", lambda: None)
    for wrong in (lambda: ContextPool(context, platform=GPU), lambda: tune(context, platform=GPU)):
        with pytest.raises(InputError, match=r"no platform 'twin:cuda' here: name one of .*, twin\."):
            wrong()
    with pytest.raises(EnergyError, match="no CUDA device"):
        twin_workers.TwinWorkers(context.getSystem(), read_state(context), 1, GPU)


def test_with_one_its_name_is_told(gpu, context):
    with pytest.raises(InputError, match=r"name one of .*, twin, twin:cuda\."):
        ContextPool(context, platform="twin:gpu")
    with pytest.raises(InputError, match=r"no platform 'twin:cuda' here"):
        tuning.check_choice(GPU, None)  # where Contexts are wanted
    with pytest.raises(InputError, match="processes are for Contexts"):
        ContextPool(context, platform=GPU, processes=True)


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA error: no kernel image"), torch.OutOfMemoryError("full")])
def test_a_device_that_cannot_be_used_is_none(monkeypatch, error):
    def first(size, device):
        assert (size, device) == (1, torch.device("cuda", 3))
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert twin_workers.gpu() is None and twin_workers.twin_names() == ["twin"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(twin_workers.torch, "zeros", first)
    if error is None:
        assert twin_workers.gpu() == torch.device("cuda", 3)
        assert twin_workers.twin_names() == ["twin", GPU]
    else:
        assert twin_workers.gpu() is None and twin_workers.twin_names() == ["twin"]


def test_its_name(monkeypatch):
    def fail():
        raise RuntimeError("no driver today")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    for there, name in ((False, ""), (True, "A card")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert twin_workers.gpu_name() == name
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    assert twin_workers.gpu_name() == ""


def test_a_gpu_that_disagrees_gives_way_to_contexts(gpu, context, caplog, monkeypatch):
    plain = twin_workers.TwinWorkers.group_energies

    def biased(self, positions):
        total, groups = plain(self, positions)
        return total + 1e-3, groups

    monkeypatch.setattr(twin_workers.TwinWorkers, "group_energies", biased)
    with ContextPool(context, platform=GPU, n_workers=1) as fallen:
        assert fallen.platform in PLATFORMS and np.isfinite(fallen.energies(FRAMES)).all()
    (said,) = warnings_of(caplog)
    assert "instead of a torch twin" in said and "differs from the Context by 0.001" in said


def test_a_gpu_that_fails_is_told(gpu, context, caplog, monkeypatch):
    failing = RuntimeError("CUDA error: an illegal address.\nCompile with TORCH_USE_CUDA_DSA.")

    def fail(*_, **__):
        raise failing

    with ContextPool(context, platform=GPU) as pool, monkeypatch.context() as broken:
        broken.setattr(SystemTwin, "evaluate", fail)
        for evaluate in (pool.energies, lambda x: pool.evaluate_on_device(torch.tensor(x))):
            with pytest.raises(EnergyError, match=r"^The GPU cannot evaluate the System \(CUDA error: an illegal addr"):
                evaluate(FRAMES)
    with ContextPool(context, platform="twin", n_workers=1) as pool, monkeypatch.context() as broken:
        broken.setattr(SystemTwin, "evaluate", fail)
        with pytest.raises(RuntimeError) as found:
            pool.energies(FRAMES)
        assert found.value is failing  # nothing is said of a GPU
    monkeypatch.setattr(twin_workers, "SystemTwin", fail)
    with ContextPool(context, platform=GPU, n_workers=1) as pool:
        assert pool.platform in PLATFORMS
    (said,) = warnings_of(caplog)
    assert said.endswith("The GPU cannot evaluate the System (CUDA error: an illegal address).") and "\n" not in said


def test_training_takes_its_name():
    from openmm_bg.training.run import _platform

    assert _platform(GPU)[0].getName() == "Reference"  # of the Context that holds positions and parameters
    with pytest.raises(InputError, match="no OpenMM platform"):
        _platform("twin:gpu")


# ------------------------------------------------------------------------------------------------ where there is one


@pytest.mark.skipif(twin_workers.gpu() is None, reason="no CUDA device")
def test_on_a_cuda_device(context, contexts):
    expected = contexts.energies(FRAMES) / thermal_energy(350)
    with ContextPool(context, platform=GPU) as pool:
        assert pool.platform == GPU
        x = torch.tensor(FRAMES, device="cuda", requires_grad=True)
        reduced_energy(x, pool, 350).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            u = reduced_energy(x, pool, 350)
            u.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert u.device == x.device and x.grad.is_cuda
        np.testing.assert_allclose(u.detach().cpu().numpy(), expected, rtol=1e-10)
        np.testing.assert_allclose(pool.energies(FRAMES) / thermal_energy(350), expected, rtol=1e-10)
        assert (pool.n_energies, pool.n_nonfinite) == (3 * len(FRAMES), 0)
