"""Replica exchange in temperature on OpenMM's own sampler: a module of its own, for that class came with OpenMM 8.6."""

from __future__ import annotations

import math

import numpy as np

import torch  # noqa: F401  # isort: skip  (before OpenMM, or its torch plugin does not load)
from openmm import app, unit  # isort: skip

from openmm_bg.energy import BOLTZMANN


class Ladder(app.ReplicaExchangeSampler):
    """OpenMM's replica exchange, with a random stream of its own and frames of the coldest state kept in memory."""

    def __init__(self, states, simulation, steps_per_iteration, steps_per_frame, seed):
        super().__init__(states, simulation, steps_per_iteration)
        self._rng = np.random.default_rng(seed)
        self._steps_per_frame = steps_per_frame
        self._kt = [BOLTZMANN * s["temperature"].value_in_unit(unit.kelvin) for s in states]
        self.frames: list[np.ndarray] = []
        self.record = False

    def simulateReplica(self, index, steps=None):
        if self.replicaStateIndex[index] != 0 or not self.record:
            super().simulateReplica(index, steps)
            return
        context = self.simulation.context
        for _ in range(max(1, self.stepsPerIteration // self._steps_per_frame)):
            super().simulateReplica(index, self._steps_per_frame)
            frame = context.getState(positions=True).getPositions(asNumpy=True)._value
            self.frames.append(frame.astype(np.float32))

    def exchangeReplicas(self):
        # Temperature exchange of neighbours, even and odd pairs in turn, drawn from this ladder's own stream (the
        # parent draws from Python's global one, which two threads share).
        order = np.argsort(self.replicaStateIndex)
        energy = [self.replicaStateEnergy[r][0].value_in_unit(unit.kilojoules_per_mole) for r in order]
        for low in range(self.currentIteration % 2, len(order) - 1, 2):
            log_ratio = (1 / self._kt[low] - 1 / self._kt[low + 1]) * (energy[low] - energy[low + 1])
            if math.log(self._rng.random() or 1e-300) < log_ratio:
                a, b = int(order[low]), int(order[low + 1])
                self.replicaStateIndex[a], self.replicaStateIndex[b] = low + 1, low
