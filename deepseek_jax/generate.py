"""Let a trained model write: `python -m deepseek_jax.generate RUN --prompt "Once" --max-new-tokens 100`.

The prompts are read in one pass; then each step computes one token per sequence over a cache of
latents, kv_lora_rank + qk_rope_head_dim numbers per token and layer.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from deepseek_jax.compilation import compiler_options
from deepseek_jax.config import ModelConfig, load_config
from deepseek_jax.data.tokenizer import end_of_document_id, load_tokenizer
from deepseek_jax.errors import UserError, run_command
from deepseek_jax.model.decoding import Cache, Weights, decode, prefill, prepare
from deepseek_jax.precision.fp8 import require_fp8
from deepseek_jax.training.checkpoint import Checkpoints

LENGTH_MULTIPLE = 32
"""Prompts and caches are padded to a multiple of this, so that few lengths are compiled."""


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(prog="python -m deepseek_jax.generate", description="Let a trained model write.")
    parser.add_argument("run", help="run directory of deepseek_jax.train")
    parser.add_argument("--prompt", action="append", help="text to go on from; repeat it for several at once")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample among the likeliest tokens of this total")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="checkpoint to use instead of the last")
    args = parser.parse_args()
    run_command(lambda: write(args))


def write(args: argparse.Namespace) -> None:
    """Stream the first prompt's continuation, then print the others'."""
    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    jax.config.update("jax_default_matmul_precision", "highest")
    config, tokenizer, variables = load_run(Path(args.run), args.step)
    end = end_of_document_id(tokenizer)
    texts = args.prompt or [""]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids or [end] for text in texts]
    streams = [TextStream(tokenizer) for _ in texts]
    generator = Generator(config, variables, len(prompts))
    steps = generator.generate(prompts, args.max_new_tokens, end, args.temperature, args.top_p, args.seed)
    for number, tokens in enumerate(steps):
        if number == 0:
            print(texts[0], end="", flush=True)
        for row, (stream, token) in enumerate(zip(streams, tokens)):
            piece = stream.push(int(token)) if token != end else ""
            if row == 0:
                print(piece, end="", flush=True)
    print(streams[0].rest())
    for text, stream in zip(texts[1:], streams[1:]):
        stream.rest()
        print(f"---\n{text}{stream.text}")


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse what cannot be sampled by; raises `UserError`."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if temperature < 0:
        raise UserError(f"temperature={temperature}: must be at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be in (0, 1]")


def load_run(run_dir: Path, step: int | None = None) -> tuple[ModelConfig, Tokenizer, dict[str, Any]]:
    """Model config, tokenizer and variables of a run's checkpoint, the last one by default."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: no run here: {path} is missing")
    config = load_config(path)
    if config.model.precision == "fp8":
        require_fp8()
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    checkpoints = Checkpoints(run_dir, config)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise UserError(f"{run_dir}: no checkpoint yet")
    return config.model, tokenizer, checkpoints.restore_variables(step)


class Generator:
    """A model ready to write; what it compiles for one prompt length serves the next call too.

    Args:
        variables: of a `DeepseekV3`.
        sequences: prompts to be continued at once; more or fewer are right too, but slower.
    """

    def __init__(self, config: ModelConfig, variables: dict[str, Any], sequences: int = 1):
        self._config = config
        self._weights = prepare(config, variables, sequences)
        self._first = jax.jit(
            partial(_first, config), static_argnames=("cache_length", "greedy"),
            compiler_options=compiler_options(jax.default_backend()),
        )  # fmt: skip
        self._following = jax.jit(partial(_following, config), static_argnames="greedy", donate_argnums=1)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_of_document: int | None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """Continue several prompts at once.

        Args:
            prompts: token ids, at least one each; their lengths may differ.
            end_of_document: ends a sequence; None never does.
            temperature: 0 takes the likeliest token.

        Yields:
            The next token of every sequence, [B]; `end_of_document` for those that have ended. Stops
            when all have, after max_new_tokens, or at the end of the model's context.

        Raises:
            UserError: when a prompt does not fit the context.
        """
        lengths = np.array([len(prompt) for prompt in prompts])
        context = self._config.max_position_embeddings
        if lengths.max() > context:
            raise UserError(f"the prompt has {lengths.max()} tokens; the context (max_position_embeddings) is {context}")
        tokens = np.zeros((len(prompts), _rounded_up(lengths.max())), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        steps = min(max_new_tokens, context + 1 - int(lengths.max()))
        greedy, settings = temperature == 0, (jnp.float32(temperature), jnp.float32(top_p))
        keys = jax.random.split(jax.random.key(seed), steps)

        positions = jnp.asarray(lengths, jnp.int32)
        token, cache = self._first(
            self._weights, tokens, positions, settings, keys[0],
            cache_length=_rounded_up(lengths.max() + steps), greedy=greedy,
        )  # fmt: skip
        ended = np.zeros(len(prompts), bool)
        for count, key in enumerate(keys):
            if count:
                token, cache = self._following(self._weights, cache, token, positions, settings, key, greedy=greedy)
                positions = positions + 1
            told = np.where(ended, -1 if end_of_document is None else end_of_document, np.asarray(token))
            yield told
            ended |= told == end_of_document
            if ended.all():
                return


def _rounded_up(length: int) -> int:
    return int(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def _first(
    config: ModelConfig, weights: Weights, tokens: jax.Array, lengths: jax.Array, settings: tuple[jax.Array, jax.Array],
    key: jax.Array, cache_length: int, greedy: bool,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Read the prompts [B, P] and choose the first new token of each."""
    logits, cache = prefill(config, weights, tokens, lengths, cache_length)
    return sample_token(logits, *settings, key, greedy), cache


def _following(
    config: ModelConfig, weights: Weights, cache: Cache, token: jax.Array, positions: jax.Array,
    settings: tuple[jax.Array, jax.Array], key: jax.Array, greedy: bool,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Take in the tokens [B] at positions [B] and choose the ones after them."""
    logits, cache = decode(config, weights, cache, token, positions)
    return sample_token(logits, *settings, key, greedy), cache


def sample_token(logits: jax.Array, temperature: jax.Array, top_p: jax.Array, key: jax.Array, greedy: bool) -> jax.Array:
    """Choose a token per row of logits [B, V] among the likeliest that together reach `top_p`."""
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    order = jnp.argsort(-logits, axis=-1)
    sorted_logits = jnp.take_along_axis(logits, order, axis=-1)
    probabilities = jax.nn.softmax(sorted_logits, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    choice = jax.random.categorical(key, jnp.where(before < top_p, sorted_logits, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


class TextStream:
    """Turns tokens into text as they come, holding back characters that are not complete yet."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """Text that has become certain with this token."""
        self._tokens.append(token)
        decoded = self._tokenizer.decode(self._tokens, skip_special_tokens=False)
        return self._advance("" if decoded.endswith("\N{REPLACEMENT CHARACTER}") else decoded)

    def rest(self) -> str:
        """What was still held back at the end."""
        return self._advance(self._tokenizer.decode(self._tokens, skip_special_tokens=False))

    def _advance(self, decoded: str) -> str:
        piece, self.text = decoded[len(self.text) :], max(decoded, self.text, key=len)
        return piece


if __name__ == "__main__":
    main()
