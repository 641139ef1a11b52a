"""What does not fit is found in another process: nothing that openmm-torch does ends the user's."""

from importlib.resources import files

import pytest

from openmm_bg import doctor, openmm_torch
from openmm_bg.data import FILE
from openmm_bg.errors import InputError
from openmm_bg.force import FlowForce
from openmm_bg.openmm_torch import find_openmm_torch

import openmm  # isort: skip

PATH = files("openmm_bg.data") / FILE


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Put a module ``openmmtorch`` with this source in front of any real one."""

    def install(source):
        (tmp_path / "openmmtorch.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        openmm_torch._asked.cache_clear()

    yield install
    openmm_torch._asked.cache_clear()


#: A stand-in whose TorchForce is a PythonForce of the probe's spring.
STAND_IN = (
    "import numpy, openmm\n"
    "def compute(state):\n"
    "    x = numpy.asarray(state.getPositions(asNumpy=True)._value)\n"
    "    scale = state.getParameters()['scale']\n"
    "    return scale * (x**2).sum(), -2 * scale * x\n"
    "class TorchForce(openmm.PythonForce):\n"
    "    def __init__(self, module):\n"
    "        super().__init__(compute, {'scale': 1.0})\n"
    "    def setOutputsForces(self, value):\n"
    "        pass\n"
    "    def addGlobalParameter(self, name, value):\n"
    "        assert (name, value) == ('scale', 1.0)\n"
)
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
BROKEN = {
    "crash": (CRASH, "crashed (SIGSEGV)"),
    "crash when copied": (f"{STAND_IN}    def __deepcopy__(self, memo):\n        {CRASH}\n", "crashed (SIGSEGV)"),
    "import": ("raise ImportError('libnvrtc.so.12: cannot open shared object file')", "libnvrtc.so.12"),
    "hang": ("import time; time.sleep(60)", "no answer within 3 s"),
    "raise": (
        "class TorchForce:\n"
        "    def __init__(self, module):\n"
        "        raise RuntimeError('Traceback:\\nRuntimeError: set_stride is not allowed\\nor so\\nframe #1')\n",
        "(RuntimeError: set_stride is not allowed)",
    ),
    "wrong forces": (STAND_IN.replace("-2 * scale", "-3 * scale"), "has energy 0.01 and force -0.3"),
    "deaf to its parameter": (STAND_IN.replace("state.getParameters()['scale']", "1.0"), "energy 0.02 has energy 0.01"),
}


@pytest.mark.parametrize(("source", "expected"), BROKEN.values(), ids=BROKEN)
def test_broken_openmm_torch_is_survived(plugin, source, expected):
    plugin(source)
    works, found = find_openmm_torch(3.0 if "sleep" in source else 120.0)
    assert not works and expected in found and "\n" not in found


def test_working_openmm_torch_is_found(plugin):
    """The probe itself is right."""
    plugin(STAND_IN)
    works, found = find_openmm_torch()
    assert works, found
    assert "CPU and Reference" in found


def test_missing_openmm_torch(monkeypatch):
    monkeypatch.setattr(openmm_torch, "find_spec", lambda name: None)
    assert find_openmm_torch() == (False, "it is not installed")


# -------------------------------------------------------------------- what users are told


def test_flow_force_refuses_in_one_sentence(plugin):
    """In the user's process: a wheel that would end it when a System is copied."""
    plugin(BROKEN["crash when copied"][0])
    for _ in range(2):  # the second time from memory
        with pytest.raises(InputError, match=r"crashed \(SIGSEGV\).*leave backend out") as error:
            FlowForce(PATH, 300, backend="torch")
        assert "\n" not in str(error.value)
    assert isinstance(FlowForce(PATH, 300), openmm.PythonForce)


def test_flow_force_without_openmm_torch(monkeypatch):
    openmm_torch._asked.cache_clear()
    monkeypatch.setattr(openmm_torch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs openmm-torch, but it is not installed: leave backend out"):
        FlowForce(PATH, 300, backend="torch")
    openmm_torch._asked.cache_clear()


def test_doctor_names_what_is_used(monkeypatch):
    monkeypatch.setattr(doctor, "find_openmm_torch", lambda timeout: (False, "version 1.5 does not work (reason)"))
    finding = doctor._openmm_torch(1.0)
    assert not finding.works and not finding.needed
    assert finding.detail == (
        "version 1.5 does not work (reason): FlowForce uses openmm.PythonForce, which needs no plugin."
    )


def test_doctor_tries_the_flow_itself(monkeypatch):
    """A TorchForce may work where the flow's own does not: the real probe, next to a claim that all is well."""
    monkeypatch.setattr(doctor, "find_openmm_torch", lambda timeout: (True, "version 0 works"))
    monkeypatch.setattr(
        doctor,
        "run_isolated",
        lambda code, timeout, *arguments: (arguments == ("torch",) and "probe_force" in code, "told"),
    )
    finding = doctor._openmm_torch(1.0)
    assert finding.works and finding.detail.startswith("version 0 works; told: FlowForce uses openmm.PythonForce, or a")
    monkeypatch.setattr(doctor, "run_isolated", lambda *given: (False, "the process crashed (SIGSEGV)"))
    finding = doctor._openmm_torch(1.0)
    assert not finding.works and "SIGSEGV" in finding.detail and "needs no plugin" in finding.detail
