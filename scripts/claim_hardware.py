"""scripts/claims hardware: the guide's table of hardware beside what plans say."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.config import load_config
from deepseek_jax.errors import UserError
from deepseek_jax.planning import figures

GPU_BYTES, LENGTH = 80e9, 4096
PRECISIONS = ("bfloat16", "fp8")


class Model(NamedTuple):
    """A preset, what the guide says that it needs, and where its training is planned: its header's GPUs."""

    preset: str
    guide: str
    topology: str
    fields: tuple[str, ...] = ()


MODELS = (
    Model("mini", "8 to 16 GB", "h100:1"),
    Model("small", "24 to 40 GB", "h100:8"),
    Model("medium", "40 to 80 GB", "h100:8x8"),
    Model(
        "large_671b",
        "8 to 16 x 80 GB",
        "h100:256x8",
        ("parallel.pipe=16", "parallel.pipe_interleave=2", "parallel.expert=64", "parallel.exchange_groups=8",
         "train.batch_size=16384", "train.batch_size_start=null"),
    ),
)  # fmt: skip


def hardware_table(out: Path) -> list[str]:
    """Counted for generation: weights, and the cache of one sequence. For training, the step as compiled for H100s.

    Raises:
        UserError: a plan fails; as `deepseek_jax.plan` says it.
    """
    lines = [f"Generation: weights in each precision, and the bfloat16 cache of a sequence of {LENGTH:,}. Training: state and "
             "temporaries of each GPU as planned.", "",
             "| model | the guide | generation: bfloat16 | fp8 | GPUs of 80 GB that hold the training state | planned for "
             "| training, a GPU: bfloat16 | fp8 |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for model in MODELS:
        alone = load_config(model.preset, ["model.num_nextn_predict_layers=0"])
        weights, cache = figures.checkpoint_bytes(alone), figures.cache_bytes(alone.model).latent * LENGTH
        state = figures.checkpoint_bytes(load_config(model.preset, []))["training state"]
        steps = [_planned(model, precision, out)["step"] for precision in PRECISIONS]
        cells = [
            model.preset,
            model.guide,
            *(f"{(weights[precision] + cache) / 1e9:.1f} GB" for precision in PRECISIONS),
            f"{math.ceil(state / GPU_BYTES)}",
            model.topology,
            *(f"{step['argument_bytes'] / 1e9:.1f} + {step['temporary_bytes'] / 1e9:.1f} GB" for step in steps),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _planned(model: Model, precision: str, out: Path) -> dict[str, Any]:
    """A plan by the command, in a process of its own: it takes other devices than the other claims."""
    path = out / f"{model.preset}-{precision}.json"
    print(f"\nclaim hardware: {model.preset} in {precision} on {model.topology}", flush=True)
    command = [sys.executable, "-m", "deepseek_jax.plan", "--config", model.preset, "--topology", model.topology]
    command += ["--json", str(path), f"model.precision={precision}", *model.fields]
    apart = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=apart)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return json.loads(path.read_text())
