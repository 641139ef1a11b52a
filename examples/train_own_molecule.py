"""A flow for your own molecule, from a System, a topology and MD frames.

    python train_own_molecule.py --system system.xml --topology top.pdb --trajectory traj.dcd -o model/

The System is that of one molecule, without constraints or with those of constraints=HBonds; the frames should visit
every state you care about, in any proportion. ``--quick`` makes a few steps only, to see whether the files fit
together. Ctrl-C keeps what is done: repeat the command with ``--resume``.
"""

import argparse
from pathlib import Path

import openmm
from openmm import app, unit

import openmm_bg as bg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", type=Path, required=True, help="System written by openmm.XmlSerializer")
    parser.add_argument("--topology", type=Path, required=True, help="PDB file of the same atoms, with bonds")
    parser.add_argument("--trajectory", type=Path, required=True, help="frames in a format that MDTraj reads")
    parser.add_argument("--temperature", type=float, default=300.0, help="of the frames, K (default: %(default)s)")
    parser.add_argument("--representation", choices=("full", "reduced"), default="full")
    parser.add_argument("-o", "--output", type=Path, default=Path("model"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("-n", type=int, default=None, help="samples drawn at the end (default: 10000, quick: 500)")
    arguments = parser.parse_args()

    system = openmm.XmlSerializer.deserialize(arguments.system.read_text())
    pdb = app.PDBFile(str(arguments.topology))
    config = bg.TrainingConfig.preset("cpu")
    if arguments.quick:
        stages = [stage.model_copy(update={"seconds": None, "epochs": None, "steps": 20}) for stage in config.stages]
        small = config.flow.model_copy(update={"hidden": 32})
        config = config.model_copy(update={"stages": stages, "flow": small})

    flow = bg.train(
        system,
        pdb.topology,
        arguments.trajectory,
        arguments.temperature * unit.kelvin,
        representation=arguments.representation,
        config=config,
        directory=arguments.output,  # checkpoints, losses.csv and, at the end, flow.bg
        resume=arguments.resume,
    )
    print(flow)

    context = openmm.Context(system, openmm.LangevinMiddleIntegrator(arguments.temperature, 1.0, 0.002))
    context.setPositions(pdb.positions)
    with bg.BoltzmannGeneratorSampler(arguments.output / "flow.bg", context, seed=1) as sampler:
        print(sampler.sample(arguments.n or (500 if arguments.quick else 10_000)))
        print(f"acceptance of 100 Metropolis moves: {sampler.step(100)['acceptance_probability']:.2f}")


if __name__ == "__main__":
    main()
