"""One trajectory: frames that are appended and vouched for, so that no frame is lost or doubled by an interruption.

Frames go to the end of NAME.dcd and NAME.csv. A checkpoint, written after both are on disk, holds the number of frames,
the lengths of both files and the state after the last of these frames. Continuing cuts both files to these lengths:
whatever came after the checkpoint is computed again.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import torch  # noqa: F401  # isort: skip  (before openmm: its torch plugin loads only then)
import openmm  # isort: skip
from openmm import app, unit  # isort: skip

from openmm_bg.energy import BOLTZMANN
from openmm_bg.errors import CheckpointError, EnergyError
from openmm_bg.files import write_atomically
from openmm_bg.simulate.folder import read_checkpoint
from openmm_bg.simulate.geometry import Stereochemistry
from openmm_bg.simulate.protocol import Protocol

#: Starts that are tried before giving up on one with the structure's own stereochemistry.
STARTS = 4
#: Steps between looks at whether to stop.
CHUNK = 100
CSV_HEADER = "time_ps,potential_energy_kj_mol,temperature_k\n"


class Replica:
    """A trajectory and its files.

    Parameters
    ----------
    folder, name
        Where it lies, and its name without ending.
    topology
        Of the molecule, without a box.
    stereochemistry
        That frames are compared with.
    protocol
        The settings.
    degrees_of_freedom
        For the temperature.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        topology: app.Topology,
        stereochemistry: Stereochemistry,
        protocol: Protocol,
        degrees_of_freedom: int,
    ) -> None:
        self.name = name
        self.protocol = protocol
        self._folder = folder
        self._topology = topology
        self._stereochemistry = stereochemistry
        self._dof = degrees_of_freedom
        found = read_checkpoint(folder, name) or {"frames": 0, "dcd_bytes": 0, "csv_bytes": 0, "changed": 0}
        self.frames: int = found["frames"]
        self.changed: int = found["changed"]
        self._state: str | None = found.get("state")
        self._bytes = (found["dcd_bytes"], found["csv_bytes"])
        self._cut()

    @property
    def done(self) -> bool:
        return self._state is not None and self.frames >= self.protocol.frames

    @property
    def progress(self) -> int:
        """Frames, -1 before the equilibrated start."""
        return -1 if self._state is None else self.frames

    def advance(
        self,
        context: openmm.Context,
        start: np.ndarray,
        seed: Callable[[], int],
        stop: Callable[[], bool],
        pause: Callable[[], bool],
        report: Callable[[float, float, float], None],
    ) -> None:
        """Simulate until ``pause()``, ``stop()`` or the end, then save.

        Parameters
        ----------
        context
            Any Context of the System; its state is replaced.
        start
            [N, 3] nm, minimised.
        seed
            A new seed at every call.
        stop
            Asked at every frame and between: what was run since the last frame is dropped.
        pause
            Asked at every frame.
        report
            Called with ps done, potential energy (kJ/mol) and temperature (K), the last two NaN while equilibrating.

        Raises
        ------
        EnergyError
            The simulation became unstable, or no start keeps the stereochemistry.
        """
        try:
            if self._state is None:
                if not self._equilibrate(context, start, seed, stop, report):
                    return
                if stop():
                    return
            self._produce(context, stop, pause, report)
        except openmm.OpenMMException as error:
            raise EnergyError(
                f"{self.name} became unstable after {self.frames} frames ({error}): shorten the time step, or look at "
                "the structure."
            ) from error

    def _equilibrate(
        self, context: openmm.Context, start: np.ndarray, seed: Any, stop: Callable[[], bool], report: Any
    ) -> bool:
        protocol, different = self.protocol, None
        for _ in range(STARTS):
            integrator: Any = context.getIntegrator()
            context.setTime(0.0)
            context.setPositions(start)
            context.setVelocitiesToTemperature(protocol.start_temperature, seed())
            try:
                for kelvin, ps in ((protocol.start_temperature, protocol.heating), (0.0, protocol.equilibration)):
                    integrator.setTemperature(kelvin or protocol.temperature)
                    if not _steps(integrator, protocol.steps(ps), stop, lambda dt: report(dt, np.nan, np.nan)):
                        return False
            finally:
                integrator.setTemperature(protocol.temperature)
            state = context.getState(positions=True, velocities=True, energy=True)
            self._examine(state)
            different = self._stereochemistry.difference(state.getPositions(asNumpy=True)._value)
            if different is None:
                self._save(state)
                return True
        raise EnergyError(
            f"{STARTS} starts of {self.name} have changed {different} while heated to {protocol.start_temperature:g} "
            "K: lower --start-temperature, or look at the structure there."
        )

    def _produce(
        self, context: openmm.Context, stop: Callable[[], bool], pause: Callable[[], bool], report: Any
    ) -> None:
        protocol = self.protocol
        context.setState(openmm.XmlSerializer.deserialize(self._state))
        integrator: Any = context.getIntegrator()
        state = None
        with open(self._path("dcd"), "r+b") as dcd, open(self._path("csv"), "ab") as csv:
            writer = app.DCDFile(
                dcd, self._topology, protocol.time_step, protocol.steps_per_frame, protocol.steps_per_frame, append=True
            )
            try:
                while self.frames < protocol.frames and not pause():
                    if not _steps(integrator, protocol.steps_per_frame, stop, None):
                        break  # the piece since the last frame is lost, not the frame
                    new = context.getState(positions=True, velocities=True, energy=True)
                    energy, kelvin = self._examine(new)
                    x = new.getPositions(asNumpy=True)._value
                    writer.writeModel(x * unit.nanometer)
                    csv.write(f"{(self.frames + 1) * protocol.interval:.12g},{energy:.6f},{kelvin:.3f}\n".encode())
                    self.changed += int(not self._stereochemistry.unchanged(x[None])[0])
                    # Lengths of this moment, not of the files in the end: a disk may fill within the next frame.
                    self.frames, state, self._bytes = self.frames + 1, new, (dcd.tell(), csv.tell())
                    report(protocol.interval, energy, kelvin)
            finally:
                if state is not None:
                    for file in (dcd, csv):
                        file.flush()
                        os.fsync(file.fileno())
                    self._save(state)

    def _examine(self, state: openmm.State) -> tuple[float, float]:
        """Potential energy (kJ/mol) and temperature (K) of a state, all of it finite."""
        energy = state.getPotentialEnergy()._value
        kelvin = 2.0 * state.getKineticEnergy()._value / (self._dof * BOLTZMANN)
        positions = state.getPositions(asNumpy=True)._value
        if not (np.isfinite(energy) and np.isfinite(kelvin) and np.isfinite(positions).all()):
            raise EnergyError(
                f"{self.name} became unstable after {self.frames} frames: shorten the time step, or look at the "
                "structure."
            )
        return float(energy), float(kelvin)

    def _save(self, state: openmm.State) -> None:
        self._state = openmm.XmlSerializer.serialize(state)
        content = {
            "frames": self.frames,
            "dcd_bytes": self._bytes[0],
            "csv_bytes": self._bytes[1],
            "changed": self.changed,
            "state": self._state,
        }
        write_atomically(self._path("checkpoint.json"), json.dumps(content))

    def _path(self, ending: str) -> Path:
        return self._folder / f"{self.name}.{ending}"

    def _cut(self) -> None:
        """Both files as the checkpoint knows them."""
        dcd, csv = self._path("dcd"), self._path("csv")
        if self.frames == 0:
            with open(dcd, "wb") as file:
                p = self.protocol
                app.DCDFile(file, self._topology, p.time_step, p.steps_per_frame, p.steps_per_frame)
            csv.write_text(CSV_HEADER, encoding="ascii")
            self._bytes = (dcd.stat().st_size, csv.stat().st_size)
            return
        for path, size in zip((dcd, csv), self._bytes, strict=True):
            if not path.exists() or path.stat().st_size < size:
                raise CheckpointError(f"{path} is shorter than its checkpoint says: restore it, or start anew.")
            os.truncate(path, size)
        with open(dcd, "r+b") as file:  # number of frames and last step, which the cut frames had raised
            file.seek(8)
            file.write(struct.pack("<i", self.frames))
            file.seek(20)
            file.write(struct.pack("<i", min(self.frames * self.protocol.steps_per_frame, 2**31 - 1)))


class Queue:
    """Replicas that wait for a Context: the one that lags most goes first."""

    def __init__(self, replicas: list[Replica]) -> None:
        self._waiting = [replica for replica in replicas if not replica.done]
        self._lock = threading.Lock()

    def take(self) -> Replica | None:
        """The next replica, None if none waits."""
        with self._lock:
            if not self._waiting:
                return None
            chosen = min(self._waiting, key=lambda replica: replica.progress)
            self._waiting.remove(chosen)
            return chosen

    def give_back(self, replica: Replica) -> None:
        """Let a replica wait again, unless it is done."""
        with self._lock:
            if not replica.done:
                self._waiting.append(replica)


def _steps(integrator: Any, n: int, stop: Callable[[], bool], report: Callable[[float], None] | None) -> bool:
    """Run n steps; False if asked to stop before their end."""
    dt = integrator.getStepSize()._value
    while n > 0:
        if stop():
            return False
        chunk = min(n, CHUNK)
        integrator.step(chunk)
        n -= chunk
        if report is not None:
            report(chunk * dt)
    return True
