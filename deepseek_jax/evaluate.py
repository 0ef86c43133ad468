"""How well a model predicts text: `python -m deepseek_jax.evaluate RUN FILE...`.

Every document is read from its beginning, after the token that begins or ends a text, and each of its tokens counts once;
of a conversation (--chat) those of the assistant's words, as in training on conversations.
Bits per byte compare models with any tokenizers; perplexity only those with the same.
"""

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from deepseek_jax.data.conversations import conversation_files, read_conversations
from deepseek_jax.data.documents import find_files, read_documents
from deepseek_jax.data.tokenizer import token_byte_lengths
from deepseek_jax.errors import UserError, run_command
from deepseek_jax.generation.chat import ChatTemplate, load_chat_template
from deepseek_jax.generation.scoring import Scorer
from deepseek_jax.training.loading import LoadedModel, load_model

DEFAULT_CONTEXT, BATCH_TOKENS = 2048, 4096
"""Tokens to look back on, unless the model's own context is shorter; and those read at once."""


class Score(NamedTuple):
    """Of a file, or of several."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0

    @property
    def bits_per_byte(self) -> float:
        """Of the text's own bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """Of its tokens."""
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan

    def plus(self, other: "Score") -> "Score":
        """Both together."""
        documents, tokens, size, nats = (ours + theirs for ours, theirs in zip(self, other))
        return Score(int(documents), int(tokens), int(size), nats)


def main() -> None:
    """Parse the command line and score."""
    parser = argparse.ArgumentParser(
        prog="python -m deepseek_jax.evaluate", description="How well a model predicts text, in bits per byte.",
        epilog="example: python -m deepseek_jax.evaluate runs/mine held_out.txt more.jsonl",
    )  # fmt: skip
    parser.add_argument("run", help="run directory of deepseek_jax.train, or Hugging Face directory")
    files = "text, .jsonl or .parquet files (a document a line), directories or globs; and parallel.FIELD=N to use a mesh"
    parser.add_argument("file", nargs="+", help=files)
    context = f"tokens to look back on, at most ({DEFAULT_CONTEXT}, or the model's own)"
    parser.add_argument("--context", type=int, metavar="N", help=context)
    stride = "of longer texts: new tokens of each window (all of the context); fewer look back further"
    parser.add_argument("--stride", type=int, metavar="N", help=stride)
    chat = "files hold conversations, a list `messages` in each line; of them the assistant's words count"
    parser.add_argument("--chat", action="store_true", help=chat)
    parser.add_argument("--step", type=int, help="checkpoint of the run to use instead of the last")
    args = parser.parse_args()
    run_command(lambda: evaluate(args))


def evaluate(args: argparse.Namespace) -> None:
    """Score each file and print a line for it."""
    parallel = [word for word in args.file if word.startswith("parallel.") and "=" in word]
    find = conversation_files if args.chat else find_files
    files = find([word for word in args.file if word not in parallel])
    jax.config.update("jax_default_matmul_precision", "highest")
    model = load_model(Path(args.run), args.step, parallel, stacked=True)
    if model.tokenizer is None:
        raise UserError(f"{args.run}: has no tokenizer.json, which turns text into its tokens")
    context = _within(args.context, "--context", model.config.max_position_embeddings, DEFAULT_CONTEXT)
    stride = _within(args.stride, "--stride", context, context)
    scorer = Scorer(model.config, model.variables, context, stride, max(BATCH_TOKENS // context, 1), model.division)
    scores, total = partial(_scores, args.chat, model, scorer), Score()
    width = min(max(len(_shown(file)) for file in files) + 2, 60)
    print(f"{'file':{width}}{'documents':>10}{'tokens':>12}{'bytes':>12}{'bits/byte':>11}{'perplexity':>12}", flush=True)
    columns = SpinnerColumn(), TextColumn("{task.description} {task.fields[tokens]:,} tokens"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for file in files:
            task, score = progress.add_task(_shown(file), tokens=0), Score()
            for document in scores(file):
                score = score.plus(document)
                progress.update(task, tokens=score.tokens)
            progress.remove_task(task)
            progress.console.file.flush()
            print(_line(_shown(file), score, width), flush=True)
            total = total.plus(score)
    if len(files) > 1:
        print(_line("all", total, width))


def _scores(chat: bool, model: LoadedModel, scorer: Scorer, file: Path) -> Iterator[Score]:
    """Each document's or conversation's score."""
    assert model.tokenizer is not None
    if chat:
        template = load_chat_template(model.directory, model.tokenizer)
        sizes = token_byte_lengths(model.tokenizer, model.config.vocab_size)
        return score_conversations(scorer, template, sizes, file)
    return score_documents(scorer, model.tokenizer, first_token(model), read_texts(file))


def first_token(model: LoadedModel) -> int:
    """What every document is read after; raises `UserError` for a model that names none."""
    if model.begin is None:
        raise UserError(f"{model.directory}: no token to read a text after; name one as bos_token_id in config.json")
    return model.begin


def read_texts(file: Path) -> Iterator[str]:
    """The documents of a file."""
    return (row["text"] for row in read_documents([str(file)]))


def score_documents(scorer: Scorer, tokenizer: Tokenizer, first: int, texts: Iterator[str]) -> Iterator[Score]:
    """Each document's score."""
    sizes: list[int] = []

    def sequences() -> Iterator[list[int]]:
        for text in texts:
            sizes.append(len(text.encode("utf-8", errors="replace")))
            yield [first, *tokenizer.encode(text, add_special_tokens=False).ids]

    for scored in scorer.score(sequences()):
        yield Score(1, len(scored.nats), sizes.pop(0), float(np.sum(scored.nats, dtype=np.float64)))


def score_conversations(scorer: Scorer, template: ChatTemplate, sizes: np.ndarray, file: Path) -> Iterator[Score]:
    """Each conversation's score: of the assistant's words, after all that was said before.

    Args:
        sizes: [V] bytes of each token.
    """
    asked: list[tuple[np.ndarray, np.ndarray]] = []

    def sequences() -> Iterator[list[int]]:
        for where, messages in read_conversations([file]):
            try:
                ids, counted = template.answers(messages)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            asked.append((np.array(ids[1:]), np.array(counted[1:], bool)))
            yield ids

    for scored in scorer.score(sequences()):
        targets, counted = asked.pop(0)
        nats = float(np.sum(scored.nats[counted], dtype=np.float64))
        yield Score(1, int(counted.sum()), int(sizes[targets[counted]].sum()), nats)


def _within(value: int | None, name: str, most: int, default: int) -> int:
    if value is None:
        return min(default, most)
    if not 1 <= value <= most:
        raise UserError(f"{name} {value}: must be from 1 to {most}")
    return value


def _shown(file: Path) -> str:
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _line(name: str, score: Score, width: int) -> str:
    if len(name) > width - 2:
        name = f"...{name[-(width - 5) :]}"
    return (f"{name:{width}}{score.documents:10,}{score.tokens:12,}{score.bytes:12,}{score.bits_per_byte:11.4f}"
            f"{score.perplexity:12.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
