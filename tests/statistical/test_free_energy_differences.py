"""Formula J between two states of the toy: other temperature, other force field; flows on either or both sides.

References come from quadrature. Every deliberate error must be caught.
"""

import numpy as np
import pytest

from openmm_bg import free_energy
from openmm_bg.free_energy.estimates import bar_root, contradiction

pytestmark = pytest.mark.statistical

N = 100_000
#: State b as a fraction of β (300 K to 400 K), and as an energy on top of the toy's.
BETA = 0.75


def extra(phi, theta):
    """What another force field adds, reduced; between -2 and 2."""
    return 0.9 * np.cos(phi - 1.3) + 1.1 * np.cos(theta)


def log_pi(toy, state, phi, theta, r, mode, broken=None):
    """log π of state "a", "hot" or "other"; `broken` leaves a term out or takes the wrong kT."""
    base = toy.log_pi(phi, theta, r, with_fixman=mode == "on", omit=broken)
    inside = np.isfinite(base)
    phi, theta, r = (np.where(inside, x, 1.0) for x in (phi, theta, r))
    if state == "hot":
        beta = 0.5 * (1 + BETA) if broken == "kT" else BETA
        return np.where(inside, base + (1 - beta) * toy.energy(phi, theta, r), -np.inf)
    if state == "other":
        return np.where(inside, base - extra(phi, theta) * (0.8 if broken == "kT" else 1.0), -np.inf)
    return base


def exact(toy, state, mode):
    """-log Z by quadrature; without constraints r is integrated over its panels."""
    phi, w_phi, _ = toy._panels(toy.PHI_EDGES, order=8)
    theta, w_theta, _ = toy._panels(toy.THETA_EDGES, order=12)
    r, w_r = np.array([toy.S0]), np.ones(1)
    if mode == "off":
        r, w_r, _ = toy._panels(np.linspace(0.5, 1.6, 12), order=6)
    grid = np.meshgrid(phi, theta, r, indexing="ij")
    weight = w_phi[:, None, None] * w_theta[None, :, None] * w_r[None, None, :]
    return -np.log(np.sum(np.exp(log_pi(toy, state, *grid, mode)) * weight))


def draw(toy, mode, n, seed, **flow):
    """(φ, θ, r) of flow samples, and log q."""
    y, log_q = toy.ToyFlow(n_dim=3 if mode == "off" else 2, **flow).sample((n,), np.random.default_rng(seed))
    return toy.full(y, toy.S0), log_q


def weights(toy, mode, states, n, seed, broken=None):
    """log w [K, n] of the same samples in each state."""
    x, log_q = draw(toy, mode, n, seed)
    return np.stack([log_pi(toy, s, *x, mode, broken) - log_q * (broken != "log_q") for s in states])


def frames_of_other(toy, n, seed):
    """Independent samples [3, n] of state "other" with constraints: those of state a, thinned."""
    rng = np.random.default_rng(seed)
    found = []
    while sum(map(len, found)) < n:
        x = toy.draw_exact(4 * n, rng, with_fixman=True, r=toy.S0)
        found.append(x[np.log(rng.random(len(x))) < -extra(x[:, 0], x[:, 1]) - 2.0])
    return np.concatenate(found)[:n].T


def test_quadrature_agrees_with_the_toys_own(toy):
    assert -exact(toy, "a", "on") == pytest.approx(toy.reference(with_fixman=True, r=toy.S0).log_z, abs=1e-10)
    assert -exact(toy, "a", "off") == pytest.approx(toy.reference(with_fixman=False).log_z, abs=1e-6)


def check_common(toy, state, mode, broken=None):
    """One flow for both states, weights of the same samples."""
    result = free_energy.common_difference(*weights(toy, mode, ("a", state), N, 21, broken))
    verdict = toy.Verdict(f"common samples, {state}, {mode}, broken={broken}", N)
    verdict.number("dF", result.delta_f, result.error, exact(toy, state, mode) - exact(toy, "a", mode))
    return verdict.show()


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("state", ["hot", "other"])
def test_common_samples(toy, state, mode):
    check_common(toy, state, mode).assert_right()


@pytest.mark.parametrize(
    ("state", "mode", "broken"),
    [
        ("hot", "off", "jacobian"),
        ("hot", "on", "fixman"),
        ("hot", "on", "kT"),
        ("hot", "off", "log_q"),
        ("other", "off", "jacobian"),
        ("other", "on", "fixman"),
        ("other", "on", "kT"),
        ("other", "on", "log_q"),
    ],
)
def test_broken_common_samples_are_caught(toy, state, mode, broken):
    check_common(toy, state, mode, broken).assert_wrong()


def check_one_side(toy, broken=None, n=20_000, m=5_000):
    """Flow samples in both states, frames of the other force field alone."""
    log_w = weights(toy, "on", ("a", "other"), n, 22, broken)
    frames = toy.draw_exact(m, np.random.default_rng(23), with_fixman=True, r=toy.S0).T
    if broken != "frames of a":
        frames = frames_of_other(toy, m, 23)
    log_q = toy.ToyFlow().log_q(frames[:2].T) * (broken != "log_q")
    log_w_md = np.stack([log_pi(toy, s, *frames, "on", broken) - log_q for s in ("a", "other")])
    found = free_energy.mbar_with_flow(log_w, [None, log_w_md])
    verdict = toy.Verdict(f"flow and frames of one side, broken={broken}", n)
    pair = found.between(1, 2)
    verdict.number("dF", pair.delta_f, pair.error, exact(toy, "other", "on") - exact(toy, "a", "on"))
    absolute = found.between(0, 2)
    verdict.number("-log Z", absolute.delta_f, absolute.error, exact(toy, "other", "on"))
    return verdict.show(), found


def test_flow_with_frames_of_one_side(toy):
    verdict, found = check_one_side(toy)
    verdict.assert_right()
    assert found.trustworthy
    # what the frames are worth: the same flow samples alone have a larger error
    assert (
        found.between(1, 2).error < free_energy.common_difference(*weights(toy, "on", ("a", "other"), 20_000, 22)).error
    )


@pytest.mark.parametrize("broken", ["jacobian", "fixman", "kT", "log_q", "frames of a"])
def test_broken_flow_with_frames_of_one_side_is_caught(toy, broken):
    verdict, found = check_one_side(toy, broken)
    verdict.assert_wrong()
    # Without a reference: J and Φ of the toy hardly touch the slope on log w, everything else does.
    if broken not in ("jacobian", "fixman"):
        assert not found.sound[2]


def scores(toy, shift=0.0, swapped=False, repeats=300, n=1_000, m=300):
    """`contradiction` of repeated flow samples and frames of state "other"; log w of frames moved by a shift."""
    log_w = weights(toy, "on", ("other",), repeats * n, 30).reshape(repeats, n)
    frames = frames_of_other(toy, repeats * m, 31)
    md = (log_pi(toy, "other", *frames, "on") - toy.ToyFlow().log_q(frames[:2].T)).reshape(repeats, m) + shift
    # frames have no weight of zero, as `bar` makes sure
    pairs = [(b, a[a > -np.inf]) if swapped else (a, b) for a, b in zip(log_w, md, strict=True)]
    return np.array([contradiction(*bar_root(*pair)[1:]) for pair in pairs])


def check_scores(toy, title, z):
    verdict = toy.Verdict(title, z.size)
    verdict.number("mean z", z.mean(), 1 / np.sqrt(z.size), 0.0)
    verdict.number("variance of z", z.var(ddof=1), np.sqrt(2 / (z.size - 1)), 1.0)
    return verdict.show()


def test_the_score_of_right_input_is_standard_normal(toy):
    """So that a warning at `MAX_CONTRADICTION` is never a false alarm; wrong input is seen."""
    z = scores(toy)
    check_scores(toy, "score of right input", z).assert_right()
    assert np.abs(z).max() < free_energy.MAX_CONTRADICTION
    check_scores(toy, "score with frames 0.2 kT off", scores(toy, 0.2)).assert_wrong()
    check_scores(toy, "score with swapped arguments", scores(toy, swapped=True, repeats=50)).assert_wrong()


def check_two_flows(toy, broken=None, n=300_000):
    """A flow of its own for each state: two independent estimates of -log Z."""
    estimates = []
    for state, seed, options in (("a", 24, {}), ("hot", 25, {"kappa": 0.5, "stretch": 1.1, "theta_scale": 0.5})):
        x, log_q = draw(toy, "on", n, seed, **options)
        estimates.append(free_energy.one_sided(log_pi(toy, state, *x, "on", broken) - log_q * (broken != "log_q")))
    result = free_energy.difference(*estimates)
    verdict = toy.Verdict(f"two flows, broken={broken}", n)
    verdict.number("dF", result.delta_f, result.error, exact(toy, "hot", "on") - exact(toy, "a", "on"))
    return verdict.show()


def test_two_flows(toy):
    check_two_flows(toy).assert_right()


@pytest.mark.parametrize("broken", ["jacobian", "kT", "log_q"])
def test_broken_two_flows_are_caught(toy, broken):
    check_two_flows(toy, broken).assert_wrong()


def calibration(toy, title, estimates, errors):
    """Is the scatter of repeated estimates what their error bars say? log of the ratio, with its own error."""
    estimates, errors = np.asarray(estimates), np.asarray(errors)
    verdict = toy.Verdict(title, estimates.size)
    ratio = np.log(estimates.std(ddof=1) / np.sqrt(np.mean(errors**2)))
    verdict.number("log(scatter/error)", ratio, 1 / np.sqrt(2 * (estimates.size - 1)), 0.0)
    return verdict.show()


def test_error_of_common_samples_has_the_size_of_the_scatter(toy):
    """And errors added in quadrature, as if both states had samples of their own, do not."""
    repeats, n = 300, 2_000
    log_w = weights(toy, "on", ("a", "hot"), repeats * n, 26).reshape(2, repeats, n)
    results = [free_energy.common_difference(a, b) for a, b in zip(*log_w, strict=True)]
    estimates, errors = [r.delta_f for r in results], np.array([r.error for r in results])
    calibration(toy, "error of common samples", estimates, errors).assert_right()
    calibration(toy, "half the error", estimates, errors / 2).assert_wrong()
    apart = [
        np.hypot(free_energy.one_sided(a).error, free_energy.one_sided(b).error) for a, b in zip(*log_w, strict=True)
    ]
    calibration(toy, "errors in quadrature", estimates, np.array(apart)).assert_wrong()


def test_error_with_frames_of_one_side_has_the_size_of_the_scatter(toy):
    repeats, n, m = 120, 500, 200
    log_w = weights(toy, "on", ("a", "other"), repeats * n, 27).reshape(2, repeats, n)
    frames = frames_of_other(toy, repeats * m, 28)
    log_q = toy.ToyFlow().log_q(frames[:2].T)
    md = np.stack([log_pi(toy, s, *frames, "on") - log_q for s in ("a", "other")]).reshape(2, repeats, m)
    results = [free_energy.mbar_with_flow(log_w[:, k], [None, md[:, k]]).between(1, 2) for k in range(repeats)]
    estimates, errors = [r.delta_f for r in results], np.array([r.error for r in results])
    calibration(toy, "error with frames of one side", estimates, errors).assert_right()
    calibration(toy, "half the error", estimates, errors / 2).assert_wrong()
    verdict = toy.Verdict("mean of repeats with frames of one side", repeats)
    expected = exact(toy, "other", "on") - exact(toy, "a", "on")
    verdict.number("dF", np.mean(estimates), np.std(estimates, ddof=1) / np.sqrt(repeats), expected)
    verdict.show().assert_right()


def test_basins_as_states_without_samples(toy):
    """Umbrella windows of φ, and the two basins as states with u = 0 inside and +inf outside."""
    rng = np.random.default_rng(29)
    centres, spring = np.linspace(-np.pi, np.pi, 6, endpoint=False), 1.5
    x = toy.draw_exact(60_000, rng, with_fixman=True, r=toy.S0)
    kept = [x[np.log(rng.random(len(x))) < spring * (np.cos(x[:, 0] - c) - 1)][:1_500] for c in centres]
    phi = np.concatenate(kept)[:, 0]
    inside = (phi > 0) & (phi < np.pi / 2)
    u = [spring * (1 - np.cos(phi - c)) for c in centres] + [np.where(mask, 0.0, np.inf) for mask in (~inside, inside)]
    found = free_energy.mbar(u, [*map(len, kept), 0, 0]).between(6, 7)
    ref = toy.reference(with_fixman=True, r=toy.S0)
    share = ref.phi[6:9].sum()
    verdict = toy.Verdict("basins from umbrella windows", phi.size)
    verdict.number("dF", found.delta_f, found.error, -np.log(share / (1 - share)))
    verdict.show().assert_right()
    wrong = toy.Verdict("basins from umbrella windows, their bias forgotten", phi.size)
    plain = np.log((1 - inside.mean()) / inside.mean())
    wrong.number("dF", plain, found.error, -np.log(share / (1 - share)))
    wrong.show().assert_wrong()
