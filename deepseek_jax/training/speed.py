"""Which share of the devices' peak a run's tokens a second come to (MFU)."""

from collections.abc import Callable, Sequence
from typing import Optional

import jax

from deepseek_jax.config import Config
from deepseek_jax.planning.figures import flops_by_part
from deepseek_jax.planning.machines import machine_of


def share_of_peak(config: Config, devices: Sequence[jax.Device]) -> Optional[Callable[[float], float]]:
    """From tokens a second on these devices to the share; None where their peak is not known.

    What a token needs is counted (forward and backward, causal attention); what is made again is not. The peak is float8's
    for fp8, else bfloat16's.
    """
    machine = machine_of(devices[0].device_kind)
    if machine is None:
        return None
    a_token = sum(
        flops.forward + flops.backward for flops in flops_by_part(config.model, config.train.sequence_length).values()
    )
    peak = len(devices) * (machine.fp8_flops if config.model.precision == "fp8" else machine.bf16_flops)
    return lambda tokens_per_second: tokens_per_second * a_token / peak
