"""What the benchmarks against Hugging Face transformers share: two processes that hold the same weights.

Each side runs in a process of its own and works only when asked, so that runs can alternate and a
machine whose speed drifts slows both.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else the idle side's threads spin while the other works

import numpy as np

from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.config import HOW_COMPUTED, Config


class Side:
    """One of the two processes: the same script, started with `--worker NAME --folder FOLDER`."""

    def __init__(self, name: str, folder: Path, overrides: list[str]):
        command = [sys.executable, sys.argv[0], "--worker", name, "--folder", str(folder), *overrides]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *request: object) -> list[float]:
        """Have it do something; the numbers it answers with. Raises EOFError if it died of it."""
        try:
            print(*request, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise EOFError from None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        return [float(word) for word in line.split()]

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()


def serve(actions: dict[str, Callable[..., list[float]]]) -> None:
    """Answer requests from standard input, `NAME ARGUMENT...`, until it closes.

    `memory` is always among them: the peak of this process in bytes.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    actions["memory"] = lambda: [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
    for line in sys.stdin:
        name, *arguments = line.split()
        print(*actions[name](*map(int, arguments)), file=answers, flush=True)


def save_weights(variables: dict, config: Config, folder: Path) -> None:
    """Leave our weights where `transformers_model` finds them."""
    for place in layout(config.model):
        leaf = variables
        for key in place.path:
            leaf = leaf[key]
        value = np.asarray(leaf[place.index])
        np.save(folder / f"{place.name}.npy", value.T if place.transposed else value)


def transformers_model(config: Config, folder: Path, experts: str):
    """transformers' model with the weights in `folder` and one of its expert implementations."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    ours = (*HOW_COMPUTED, "mtp_hidden_after_norm", "num_nextn_predict_layers", "rope_scaling")
    names = {field: getattr(config.model, field) for field in config.model.__dataclass_fields__ if field not in ours}
    rope = {"rope_type": "default", "rope_theta": names.pop("rope_theta")}
    special = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**names, **special, rope_parameters=rope, num_mtp_layers=0))
    model.set_experts_implementation(experts)
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for place in layout(config.model):
            value = torch.from_numpy(np.load(folder / f"{place.name}.npy"))
            prefix, _, rest = place.name.partition(".experts.")
            if not rest:
                parameters[place.name].copy_(value)
                continue
            expert, proj, _ = rest.split(".")
            if proj == "down_proj":
                parameters[f"{prefix}.experts.down_proj"][int(expert)].copy_(value)
            else:  # an MoE layer's experts are kept in two fused arrays
                gate, up = parameters[f"{prefix}.experts.gate_up_proj"][int(expert)].chunk(2)
                (gate if proj == "gate_proj" else up).copy_(value)
    return model
