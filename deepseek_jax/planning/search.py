"""Meshes, rematerialisations and parts of the batch, ranked: by a rough estimate first, then by compiling the best few.

The rough estimate knows the state's bytes exactly and all else by rule of thumb: products at half of the peak, the
traffic of weights and tokens over the links with nothing hidden, that of weights and gradients in memory, and of
activations what rematerialisation keeps. It only has to bring the right few to the compiler.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deepseek_jax.config import MESH_AXES, Config, ConfigError, ModelConfig, ParallelConfig, expert_layers
from deepseek_jax.config.trainable import trainable
from deepseek_jax.parallel.exchange import devices_of_a_token, hops_of
from deepseek_jax.parallel.mesh import make_mesh, readers, resolve
from deepseek_jax.parallel.pipeline import bubble
from deepseek_jax.parallel.sharding import Division, bytes_per_device
from deepseek_jax.parallel.summary import bytes_in_step
from deepseek_jax.planning.collectives import Collective
from deepseek_jax.planning.estimate import Estimate, arranged, estimate
from deepseek_jax.planning.figures import flops_by_part
from deepseek_jax.planning.links import Links
from deepseek_jax.planning.program import Array
from deepseek_jax.planning.topologies import Topology, make_devices
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.step import init_state

COMPILED = 3
"""How many of the candidates are compiled, each of another mesh."""
MARGIN = 1.2
"""Compiled steps needed 16 to 23% more memory than the rough estimate says."""
ROUGH_SHARE = 0.5
"""Of the peak, for products."""
REMATS = ("products", "hidden", "attention", "full")


class Candidate(NamedTuple):
    """A config that might do, and its rough estimate. Of a pipeline's sequences a stage keeps all, for its share of layers."""

    config: Config
    seconds: float
    bytes: int

    @property
    def name(self) -> str:
        """Its mesh, rematerialisation and accumulation parts."""
        sizes = {axis: getattr(self.config.parallel, axis) for axis in MESH_AXES}
        mesh = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
        hops = f" exchange_groups={groups}" if (groups := self.config.parallel.exchange_groups) > 1 else ""
        return f"{mesh}{hops}, remat={self.config.model.remat}, {self.config.train.gradient_accumulation_steps} parts"


def search(config: Config, topology: Topology, tell: Callable[[str], None]) -> dict[str, Any]:
    """Rank what fits, show it, and return it for JSON.

    Raises:
        ConfigError: nothing fits; names the candidate that needs the least memory.
    """
    found = candidates(config, topology)
    fitting = sorted((one for one in found if one.bytes <= topology.machine.memory), key=lambda one: one.seconds)
    by_mesh: dict[ParallelConfig, Candidate] = {}
    for one in fitting:
        by_mesh.setdefault(one.config.parallel, one)
    best = list(by_mesh.values())
    if not fitting:
        least = min(found, key=lambda one: one.bytes)
        raise ConfigError(
            f"--topology {topology.name}: nothing fits a device's {topology.machine.memory / 1e9:.0f} GB; "
            f"{least.name} comes nearest, with {least.bytes / 1e9:.0f} GB by a rough estimate: take more devices"
        )
    tell(f"{len(found)} candidates, of which {len(fitting)} may fit; compiling the best {min(COMPILED, len(best))}")
    ranked = _compiled(best[:COMPILED], topology)
    print(f"\n{topology.name}, best first: milliseconds a step, GB of {topology.machine.memory / 1e9:.0f} a device")
    print(f"  {'':58}{'rough ms':>10}{'rough GB':>10}{'ms':>9}{'GB':>8}")
    for one, estimated in ranked:
        if isinstance(estimated, Estimate):
            step = estimated.step
            told = f"{step.seconds * 1e3:9.0f}{step.needed_bytes / 1e9:8.1f}{'' if step.fits else '  does not fit'}"
        else:
            told = f"  {estimated}"
        print(f"  {one.name[:58]:58}{one.seconds * 1e3:10.0f}{one.bytes / 1e9:10.1f}{told}"[:100])
    for one in best[COMPILED : COMPILED + 5]:
        print(f"  {one.name[:58]:58}{one.seconds * 1e3:10.0f}{one.bytes / 1e9:10.1f}   not compiled")
    return {
        "topology": topology.name,
        "candidates": [{"name": one.name, "rough_seconds": one.seconds, "rough_bytes": one.bytes} for one in fitting],
        "compiled": [{"name": one.name} | estimated.as_dict() for one, estimated in ranked if isinstance(estimated, Estimate)],
    }


def _compiled(best: list[Candidate], topology: Topology) -> list[tuple[Candidate, Estimate | str]]:
    """Each with its plan, or with why there is none; the fastest that fits first."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    results: list[tuple[Candidate, Estimate | str]] = []
    with Progress(*columns) as progress:
        task = progress.add_task("compiling", total=len(best))
        for one in best:
            progress.update(task, description=one.name)
            try:
                results.append((one, estimate(one.config, topology, lambda line: None)))
            except ConfigError as error:
                results.append((one, str(error)))
            progress.advance(task)

    def rank(result: tuple[Candidate, Estimate | str]) -> tuple[bool, float]:
        _, found = result
        return (False, found.step.seconds) if isinstance(found, Estimate) and found.step.fits else (True, 0.0)

    return sorted(results, key=rank)


def candidates(config: Config, topology: Topology) -> list[Candidate]:
    """Every mesh of so many devices, with each rematerialisation, that the model and the batch can be divided by.

    The batch in as many accumulation parts as leave a device one sequence at a time, or a half, a quarter, an eighth of them.
    """
    devices = make_devices(topology)
    state = jax.eval_shape(partial(init_state, config))
    whole = _in_parts(config, 1)
    found = []
    for sizes, remat in itertools.product(_meshes(topology, max(config.parallel.context, 1)), REMATS):
        changed = dataclasses.replace(
            whole,
            model=dataclasses.replace(config.model, remat=remat),
            parallel=dataclasses.replace(config.parallel, **sizes),
        )
        try:
            resolve(changed, topology.devices)
        except ConfigError:
            continue
        most = arranged(changed, topology)
        parts = most.train.gradient_accumulation_steps
        divided = [_in_parts(most, parts // n) for n in (1, 2, 4, 8) if parts % n == 0]
        found += [_rough(each, topology, devices, state) for each in divided]
    if not found:
        resolve(whole, topology.devices)
        raise ConfigError(f"--topology {topology.name}: no mesh of {topology.devices} devices divides this model and batch")
    return found


def _in_parts(config: Config, parts: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_accumulation_steps=parts))


def _meshes(topology: Topology, context: int) -> Iterator[dict[str, Any]]:
    """Sizes of the other axes, and one hop or two where experts are on several hosts.

    `data` and `fsdp` share what is left so that one of them has all of it. `context` stays as the config has it.
    """
    divisors = [n for n in range(1, topology.devices + 1) if topology.devices % n == 0]
    for pipe, expert in itertools.product(divisors, divisors):
        left, alone = divmod(topology.devices // pipe, expert * context)
        if alone:
            continue
        hosts = expert // topology.per_host if topology.machine.platform == "gpu" and expert % topology.per_host == 0 else 1
        for groups, (data, fsdp) in itertools.product({1, hosts}, {(left, 1), (1, left)}):
            yield dict(pipe=pipe, data=data, fsdp=fsdp, expert=expert, exchange_groups=groups)


def _rough(config: Config, topology: Topology, devices: list, state: Any) -> Candidate:
    machine, model, train, parallel = topology.machine, config.model, config.train, config.parallel
    mesh = make_mesh(parallel, devices)
    division = Division(parallel, state.params, mesh)
    held = bytes_per_device(state, division.shardings(state, make_optimizer(train), trainable(config)))
    weights, gradients = bytes_in_step(division, config, state.params)
    sequences = train.batch_size // readers(parallel)
    at_once = sequences // train.gradient_accumulation_steps
    tokens = at_once * train.sequence_length // parallel.context

    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    kept = 1 + _kept_widths(model) / model.hidden_size
    rows = model.num_experts_per_tok * tokens
    working = 12 * rows * model.hidden_size + 8 * tokens * model.vocab_size // max(tokens // train.loss_chunk_tokens, 1)
    activations = 2 * tokens * model.hidden_size * kept * layers + working

    parts = flops_by_part(model, train.sequence_length).values()
    flops = sum(part.forward + part.backward + (0 if model.remat == "products" else part.again) for part in parts)
    products = flops * sequences * train.sequence_length / parallel.context / (ROUGH_SHARE * machine.bf16_flops)
    times = train.gradient_accumulation_steps
    if parallel.pipe > 1:
        moe, rounds = expert_layers(model), at_once // parallel.microbatch_size
        products /= 1 - bubble(moe, parallel, rounds)
        times *= rounds * parallel.pipe

    links = Links(mesh, machine, topology.per_host)

    def along(axis: str) -> np.ndarray:
        """The first devices along an axis."""
        numbers = np.moveaxis(np.arange(mesh.size).reshape(mesh.devices.shape), MESH_AXES.index(axis), -1)
        return numbers.reshape(-1, getattr(parallel, axis))[0]

    def sent(kind: str, devices: np.ndarray, size: float) -> float:
        """Seconds for an array of so many bytes."""
        whole = (Array("s8", (int(size),)),)
        return links.seconds(Collective(kind, (), tuple(devices.tolist()), whole, 1, 0, ""))

    all_weights = sum(leaf.size for leaf in jax.tree.leaves(state.params)) * 2 // (parallel.expert * parallel.pipe)
    by_layer = 3 * all_weights * train.gradient_accumulation_steps
    traffic = sum(sent("all-gather", along(axis), by_layer) for axis in ("fsdp", "context"))
    traffic += sent("all-gather", along("data"), 3 * all_weights)
    exchanges = (4 if model.remat == "products" else 5) * layers * train.gradient_accumulation_steps
    for hop in hops_of(model, parallel, tokens):
        travelling = tokens * devices_of_a_token(model, model.n_routed_experts // hop.experts) * model.hidden_size * 2
        among = along("expert")[: hop.stride * hop.devices : hop.stride]
        traffic += sent("all-to-all", among, exchanges * travelling)
    passes = times * (weights + 3 * gradients) / machine.memory_bandwidth
    return Candidate(config, products + traffic + passes, int(MARGIN * (held + weights + gradients + activations)))


def _kept_widths(m: ModelConfig) -> int:
    """Numbers a token that `model.remat` keeps of a layer beside its input."""
    if m.remat == "full":
        return 0
    if m.remat in ("attention", "hidden"):
        chosen = m.num_experts_per_tok + m.n_shared_experts if m.remat == "hidden" else 0
        hidden = 2 * chosen * m.moe_intermediate_size
        return hidden + m.num_attention_heads * m.v_head_dim + (m.q_lora_rank or 0) + m.kv_lora_rank + m.hidden_size
    q = m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    attention = 2 * q + m.num_attention_heads * (m.qk_nope_head_dim + 2 * m.v_head_dim) + m.hidden_size
    experts = m.n_shared_experts * (2 * m.moe_intermediate_size) + m.hidden_size
    return attention + experts + (m.q_lora_rank or 0) + m.kv_lora_rank
