"""The demo's page from synthetic results whose figures are known."""

import base64
import dataclasses
import html
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from openmm_bg.analysis.demo_report import (
    DemoResult,
    FreeEnergyRow,
    demo_page,
    disagreements,
    format_estimate,
    format_share,
)
from openmm_bg.errors import InputError

PLAIN, BALANCED = 0.009, 0.5  # population of the φ > 0 basin
ROWS = [
    FreeEnergyRow("weights", 4.7331, 0.0062, 100_000, "after training with 1,234,567 energies"),
    FreeEnergyRow("MD + moves", 4.751, 0.041, 232_000, "acceptance 58%"),
    FreeEnergyRow("tempered MD", 4.688, 0.049, 18_500_000, "pilot run included"),
]


def log_density(phi, psi, population, width=0.42):
    """Two basins: von Mises in φ and ψ, a common one at (-1.4, 1.2) and a rare one at (1.1, -0.9)."""

    def basin(centre_phi, centre_psi, sigma_phi, sigma_psi):
        shape = (np.cos(phi - centre_phi) - 1) / sigma_phi**2 + (np.cos(psi - centre_psi) - 1) / sigma_psi**2
        return (
            shape
            - 2 * np.log(2 * np.pi)
            - np.log(np.i0(sigma_phi**-2.0) * np.i0(sigma_psi**-2.0))
            + (sigma_phi**-2 + sigma_psi**-2)
        )

    return np.logaddexp(
        np.log1p(-population) + basin(-1.4, 1.2, width, 0.6), np.log(population) + basin(1.1, -0.9, 0.3, 0.45)
    )


def draw(rng, n, population, width=0.42):
    rare = rng.random(n) < population
    phi = np.where(rare, rng.vonmises(1.1, 0.3**-2, n), rng.vonmises(-1.4, width**-2, n))
    psi = np.where(rare, rng.vonmises(-0.9, 0.45**-2, n), rng.vonmises(1.2, 0.6**-2, n))
    return phi, psi


def synthetic_history(rng):
    history = []
    for i in range(600):
        stage = "nll" if i < 200 else "buffer"
        row = {"step": i + 1, "stage": stage, "seconds": 0.5 * (i + 1), "loss": 0.0, "nll": None, "buffer": None}
        value = -70.0 + 40.0 * math.exp(-i / 40) - 0.004 * i + rng.normal(0, 0.6)
        row["nll" if stage == "nll" else "buffer"] = row["loss"] = value
        row["validation_nll"] = value + 0.5 if i % 40 == 0 else None
        row["ess"] = min(0.95, 0.15 + 0.0015 * (i - 200) + rng.normal(0, 0.02)) if i >= 200 and i % 4 == 0 else None
        history.append(row)
    return history


def synthetic_result(n=20_000, seed=1, **changes):
    rng = np.random.default_rng(seed)
    md_phi, md_psi = draw(rng, n, BALANCED)
    phi, psi = draw(rng, n, 0.45, width=0.5)  # the flow is not quite right
    log_q = log_density(phi, psi, 0.45, width=0.5) + 0.0
    noise = rng.normal(0, 0.35, n)  # and neither are its other coordinates
    balanced = log_density(phi, psi, BALANCED) - log_q + noise
    plain = log_density(phi, psi, PLAIN) - log_q + noise
    balanced[:7] = plain[:7] = -np.inf
    energies = 20.0 + rng.gamma(27, 1.0, n) - 0.6 * noise
    energies[:7], energies[7:60] = np.inf, 1e6
    chain_phi, _ = draw(rng, 4000, PLAIN)
    chain_phi[100:103] = np.nan
    values = dict(
        md_phi=md_phi,
        md_psi=md_psi,
        md_log_weights=log_density(md_phi, md_psi, PLAIN) - log_density(md_phi, md_psi, BALANCED),
        md_reduced_potentials=20.0 + rng.gamma(27, 1.0, n)[::3],
        flow_phi=phi,
        flow_psi=psi,
        flow_log_weights=plain,
        flow_log_weights_balanced=balanced,
        flow_reduced_potentials=energies,
        flow_in_basin=(phi > 0) & (phi < 2),
        history=synthetic_history(rng),
        chain_phi=chain_phi,
        rows=list(ROWS),
        figures={
            "ESS plain, total": 0.123,
            "k-hat": 0.3141,
            "largest weight": 0.00021,
            "samples": n,
            "acceptance": 0.58,
            "cis frames, tempered MD": 41,
            "seconds, MD": 90.4,
            "seconds, training": 301.0,
            "machine": "x86_64 <2 cores> & more",
        },
        quick=False,
        seconds=541.0,
    )
    return DemoResult(**{**values, **changes})
