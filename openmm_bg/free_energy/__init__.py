"""Free energies from weights, from flow samples beside MD frames, and from chains.

All results are in kT. Formula J of docs/theory.md: Z = ∫ exp(-u) J √det Z dq. Rigid motion and momenta are
left out of Z, so that only differences between states of *one* molecule (same atoms, masses, constraints and
frame) mean anything. Where the coordinates restrict the target to a sector, Z is the sector's.

- of one state: `one_sided`, `bar`;
- between two Systems or temperatures: `difference`, with `reweight` and `at_temperature` for samples of one flow;
  `mbar_with_flow` where one side has MD frames, `mbar` for frames alone;
- between conformations: `state_difference` from weights, `chain_state_difference` from chains.
"""

from openmm_bg.free_energy.differences import at_temperature, common_difference, difference, reweight
from openmm_bg.free_energy.estimates import (
    MAX_CONTRADICTION,
    MIN_EFFECTIVE,
    MIN_LINK,
    MIN_OVERLAP,
    FreeEnergy,
    bar,
    one_sided,
)
from openmm_bg.free_energy.multistate import Multistate, mbar, mbar_with_flow
from openmm_bg.free_energy.states import (
    chain_state_difference,
    decorrelated,
    state_difference,
    statistical_inefficiency,
)

__all__ = [
    "MAX_CONTRADICTION",
    "MIN_EFFECTIVE",
    "MIN_LINK",
    "MIN_OVERLAP",
    "FreeEnergy",
    "Multistate",
    "at_temperature",
    "bar",
    "chain_state_difference",
    "common_difference",
    "decorrelated",
    "difference",
    "mbar",
    "mbar_with_flow",
    "one_sided",
    "reweight",
    "state_difference",
    "statistical_inefficiency",
]
