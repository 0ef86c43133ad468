"""Plan a run before renting the machines: `python -m deepseek_jax.plan --config large_671b --topology v5p:8x8x8 ...`.

The story of a plan: count what the model is; compile the very step that `train` would run, for devices that need not be
there; read from the program what it holds, sends and takes; and say what the whole run then comes to. Times are
estimates, of the compilers where they make them.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config, ConfigError, load_config, presets
from deepseek_jax.config.stages import stage_configs
from deepseek_jax.errors import run_command, write_atomically
from deepseek_jax.planning.topologies import KNOWN, Topology, prepare_environment, read_topology

EPILOG = f"""examples:
  python -m deepseek_jax.plan --config mini
  python -m deepseek_jax.plan --config large_671b --topology v5p:8x8x8 parallel.expert=64 parallel.fsdp=8 train.batch_size=512
  python -m deepseek_jax.plan --config small --topology h100:8 --search

topologies: {KNOWN}
Without --topology only the model's own figures are shown. A config that leaves train.gradient_accumulation_steps at 1 is
planned with as many parts as leave a device one sequence at a time."""


def main() -> None:
    """Parse the command line and plan."""
    parser = argparse.ArgumentParser(
        prog="python -m deepseek_jax.plan",
        description="What a run needs and takes, from its step compiled for devices that need not be there.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help=f"a .yaml file or a preset ({', '.join(presets())})")
    parser.add_argument("--topology", metavar="KIND:SHAPE", help="the devices, such as v5p:8x8x8 or h100:8")
    parser.add_argument("--stage", type=int, default=1, metavar="N", help="of a config's stages, the one to plan (1)")
    parser.add_argument("--layers", type=int, metavar="N", help="compile for N and N - 1 layers and extrapolate to all")
    parser.add_argument("--search", action="store_true", help="try meshes, rematerialisations, parts and hops; rank them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time and memory by part")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields of the config to change")
    run_command(lambda: plan(parser.parse_intermixed_args()))


def plan(args: argparse.Namespace) -> None:
    """Plan as the command line says.

    Raises:
        UserError: anything that the user can mend.
    """
    for name in ("layers", "search", "plot"):
        if getattr(args, name) and args.topology is None:
            raise ConfigError(f"--{name}: needs --topology; known are {KNOWN}")
    config = _stage(load_config(args.config, args.overrides), args.stage)
    topology = read_topology(args.topology) if args.topology else None
    prepare_environment(topology or read_topology("cpu:1"))  # before anything imports JAX
    from deepseek_jax.planning import figures

    found = figures.figures(config)
    print(figures.table(found), flush=True)
    content: dict[str, Any] = {"config": dataclasses.asdict(config), "model": figures.as_dict(found)}
    if topology is not None:
        content |= _plan_step(args, config, topology)
    if args.json is not None:
        write_atomically(args.json, json.dumps(content, indent=1) + "\n")


def _stage(config: Config, number: int) -> Config:
    stages = stage_configs(config)
    if not 1 <= number <= len(stages):
        raise ConfigError(f"--stage {number}: the config has {len(stages)}; give {min(max(number, 1), len(stages))}")
    return stages[number - 1]


def _plan_step(args: argparse.Namespace, config: Config, topology: Topology) -> dict[str, Any]:
    from deepseek_jax.planning import estimate, report
    from deepseek_jax.planning.search import search

    if args.search:
        return search(config, topology, tell=_tell)
    one = estimate.extrapolated if args.layers else estimate.estimate
    found = one(config, topology, _tell, **({"layers": args.layers} if args.layers else {}))
    print(f"\n{report.step_report(found.config, topology, found.step)}")
    if found.run is not None:
        print(f"\n{report.run_report(found.config, topology, found.run, found.bubble)}")
    if args.plot is not None:
        from deepseek_jax.planning.picture import draw

        draw(found.step, f"{args.config} on {topology.name}", args.plot)
        print(f"picture: {args.plot}")
    return {"topology": topology.name} | found.as_dict()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
