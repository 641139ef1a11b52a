"""Exact flow moves and learned swaps inside OpenMM's own replica exchange, and files that know whose they are."""

from openmm_bg.replica.reporter import FlowReplicaExchangeReporter
from openmm_bg.replica.sampler import FlowReplicaExchangeSampler

__all__ = ["FlowReplicaExchangeReporter", "FlowReplicaExchangeSampler"]
