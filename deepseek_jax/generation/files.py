"""Many prompts from a .jsonl file, their continuations into another: `generate --input prompts.jsonl --output out.jsonl`."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepseek_jax.checkpoint.untrusted import shown
from deepseek_jax.errors import UserError
from deepseek_jax.generation.continuation import Continuation
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling import Sampling

FORMS = ("prompt", "messages", "prompt_ids")
"""Fields of which a line has one."""


class Request(NamedTuple):
    """A line of the file."""

    fields: dict[str, Any]
    """All that it says."""
    prompt: list[int]
    """Token ids."""


def read_requests(path: Path, encode: Callable[[dict[str, Any], str], list[int]], context: int) -> list[Request]:
    """Every line's prompt.

    Args:
        encode: a line's fields, and where it is, to token ids.
        context: the longest that a prompt may be.

    Raises:
        UserError: one line naming file and line at fault.
    """
    requests = []
    for where, fields in _lines(path):
        if len(forms := [name for name in FORMS if name in fields]) != 1:
            raise UserError(f"{where}: has {' and '.join(forms) or 'no prompt'}; one of {', '.join(FORMS)} is expected")
        prompt = encode(fields, where)
        if len(prompt) > context:
            raise UserError(
                f"{where}: the prompt has {len(prompt)} tokens; the context (max_position_embeddings) is {context}"
            )
        requests.append(Request(fields, prompt))
    if not requests:
        raise UserError(f"{path}: no prompts in it")
    return requests


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        fields = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{path}:{number}: not JSON: {error}") from None
                    if not isinstance(fields, dict):
                        raise UserError(f"{path}:{number}: {shown(fields)}; an object with a prompt is expected")
                    yield f"{path}:{number}", fields
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def write_all(
    generator: Generator,
    requests: list[Request],
    continuation: Callable[[list[int]], Continuation],
    sampling: Sampling,
    seed: int,
    batch_size: int,
    output: Path,
) -> int:
    """Continue all and write a line for each, in their order; the file is there whole or not at all.

    Prompts of about the same length are continued together. What is written of one hangs on its number in the file and on
    `seed`, but not on the batch.

    Args:
        continuation: of a prompt.

    Returns:
        Tokens written.
    """
    done: dict[int, Continuation] = {}
    order = sorted(range(len(requests)), key=lambda number: len(requests[number].prompt))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[tokens]:,} tokens"), console=Console(stderr=True)) as progress:
        task, tokens = progress.add_task("prompts", total=len(requests), tokens=0), 0
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            rows = [continuation(requests[number].prompt) for number in numbers]
            for _ in generator.run(rows, sampling, seed, numbers):
                written = tokens + sum(len(row.tokens) for row in rows)
                finished = len(done) + sum(row.finish is not None for row in rows)
                progress.update(task, completed=finished, tokens=written)
            tokens += sum(len(row.tokens) for row in rows)
            done |= zip(numbers, rows)
    partial = output.with_name(output.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for number, request in enumerate(requests):
            file.write(json.dumps(request.fields | result(done[number]), ensure_ascii=False) + "\n")
    os.replace(partial, output)
    return tokens


def result(continuation: Continuation) -> dict[str, Any]:
    """What a line of output says of a continuation, besides what the line of input said."""
    told = continuation.log_probabilities
    return {
        "text": continuation.text, "tokens": continuation.tokens, "finish_reason": continuation.finish,
        **({"log_probabilities": told} if told else {}),
    }  # fmt: skip
