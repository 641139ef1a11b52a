"""`FlowForce`: the flow's own potential as an OpenMM force, through a PythonForce or through openmm-torch."""

from openmm_bg.force.flow_force import FlowForce
from openmm_bg.force.potential import FlowPotential

__all__ = ["FlowForce", "FlowPotential"]
