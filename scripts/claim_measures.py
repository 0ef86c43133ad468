"""What scripts/claims reads from a config or from a trained run, beside its losses."""

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config, ModelConfig, load_config
from deepseek_jax.data.loader import Windows, window_length
from deepseek_jax.data.packing import HELD_OUT
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.step import Scalars, init_state, make_step

TURNS, STEPS_IN_A_TURN = 4, 3


def cache_numbers(model: ModelConfig) -> dict[str, int]:
    """Numbers that a cache holds for each token and layer, by the form of attention."""
    heads = model.num_attention_heads
    return {
        "multi-head attention": heads * (model.qk_nope_head_dim + model.v_head_dim),
        "a latent for keys, one for values": 2 * model.kv_lora_rank,
        "here": model.kv_lora_rank + model.qk_rope_head_dim,
    }


def kept_bytes_per_token(model: ModelConfig, length: int = 512) -> float:
    """What a mixture-of-experts layer keeps of a token for its backward pass, by shapes alone.

    What one layer more keeps of one sequence more: so neither weights count, which serve any number of tokens, nor what
    lies outside the layers.
    """

    def kept(layers: int, sequences: int) -> int:
        module = DeepseekV3(
            dataclasses.replace(model, num_hidden_layers=layers, first_k_dense_replace=0, num_nextn_predict_layers=0)
        )
        tokens = jnp.zeros((sequences, length), jnp.int32)
        variables = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens))

        def pull_back(variables: dict):
            def states(params: dict) -> jax.Array:
                return module.apply({**variables, "params": params}, tokens, method="hidden_states")

            return jax.vjp(states, variables["params"])[1]

        leaves = jax.tree.leaves(jax.eval_shape(pull_back, variables))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    of_a_sequence = [kept(layers, 2) - kept(layers, 1) for layers in (2, 1)]
    return (of_a_sequence[0] - of_a_sequence[1]) / length


def step_seconds(configs: Sequence[Config]) -> list[float]:
    """CPU seconds of a training step of each, the median of a few turns that they take one after the other."""
    steppers = [_Stepper(config) for config in configs]
    seconds = [[stepper.seconds() for stepper in steppers] for _ in range(TURNS)]
    return np.median(seconds, axis=0).tolist()


class _Stepper:
    """Trains on the same random tokens; the first step of a turn, after the others' turns, is not counted."""

    def __init__(self, config: Config):
        shape = (1, config.train.batch_size, window_length(config))
        self._tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
        self._state = jax.jit(partial(init_state, config))()
        self._step = make_step(config)

    def seconds(self) -> float:
        for number in range(STEPS_IN_A_TURN):
            if number == 1:
                begin = time.process_time()
            scalars = Scalars(*map(np.float32, (1e-4, 0, 0.3)))
            self._state, _ = jax.block_until_ready(self._step(self._state, self._tokens, scalars))
        return (time.process_time() - begin) / (STEPS_IN_A_TURN - 1)


def second_token_acceptance(run_dir: Path, sequences: int = 64) -> float:
    """On held-out text, how often the first MTP module's likeliest token is the main model's own, a step later.

    So often would a draft of one token be accepted, greedily.
    """
    config = load_config(run_dir / "config.yaml")
    variables = Checkpoints(run_dir, config).restore_variables(config.train.steps)
    model = DeepseekV3(dataclasses.replace(config.model, capacity_factor=None))
    windows = Windows(np.load(run_dir / HELD_OUT, mmap_mode="r"), window_length(config), config.train.sequence_length, None)

    @jax.jit
    def accepted(tokens: jax.Array) -> jax.Array:
        output = model.apply(variables, tokens[:, :-1])
        main, second = (jnp.argmax(output.hidden[depth] @ output.head, axis=-1) for depth in (0, 1))
        return jnp.mean(second[:, :-1] == main[:, 1:])

    size = config.train.batch_size
    starts = range(0, min(sequences, len(windows)) // size * size, size)
    return float(np.mean([accepted(windows.take(start, size)) for start in starts]))
