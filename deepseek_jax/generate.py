"""Let a trained model write: `python -m deepseek_jax.generate RUN --prompt "Once" --max-new-tokens 100`.

RUN is a run directory or a Hugging Face directory. Several prompts are continued together, those of a file in
batches; `generation/` has the parts.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import jax

from deepseek_jax.checkpoint.untrusted import is_count, shown
from deepseek_jax.errors import UserError, run_command
from deepseek_jax.generation.chat import ChatTemplate, as_messages, load_chat_template
from deepseek_jax.generation.continuation import Continuation
from deepseek_jax.generation.files import read_requests, write_all
from deepseek_jax.generation.generator import LENGTH_MULTIPLE, Generator
from deepseek_jax.generation.sampling import Sampling
from deepseek_jax.training.loading import LoadedModel, load_model

FILE_LENGTH_MULTIPLE = 128
"""A file's prompts have many lengths: fewer of them are compiled."""


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(
        prog="python -m deepseek_jax.generate", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Let a trained model write.", epilog=(
            "examples:\n"
            '  python -m deepseek_jax.generate runs/mine --prompt "def " --temperature 0.8 --top-p 0.95\n'
            '  python -m deepseek_jax.generate my-model --chat --prompt "What is a monad?" --speculative\n'
            "  python -m deepseek_jax.generate runs/mine --input prompts.jsonl --output out.jsonl --batch-size 16\n"
            "  python -m deepseek_jax.generate my-model --input prompts.jsonl --output out.jsonl parallel.expert=8\n"
            '  where a line of prompts.jsonl is {"prompt": "..."}, {"messages": [...]} or {"prompt_ids": [...]}'
        ),
    )  # fmt: skip
    parser.add_argument("run", help="run directory of deepseek_jax.train, or Hugging Face directory")
    what = parser.add_argument_group("what to go on from")
    what.add_argument("--prompt", action="append", help="text; repeat it for several at once")
    what.add_argument("--prompt-ids", action="append", metavar="IDS", help='token ids, as in "5 9 2"; repeat it for several')
    what.add_argument("--chat", action="store_true", help="each prompt is a user's message, put into the chat template")
    what.add_argument("--system", metavar="TEXT", help="with --chat: the system's message before it")
    what.add_argument("--input", type=Path, metavar="FILE", help="a .jsonl file of prompts; needs --output")
    what.add_argument("--output", type=Path, metavar="FILE", help="their continuations, line by line")
    what.add_argument("--batch-size", type=int, default=8, metavar="N", help="of a file, prompts continued together (8)")
    how = parser.add_argument_group("how to choose tokens")
    how.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (0.8)")
    how.add_argument("--top-k", type=int, default=0, metavar="N", help="sample among the N likeliest tokens")
    how.add_argument("--top-p", type=float, default=0.95, help="sample among the likeliest tokens of this total (0.95)")
    how.add_argument("--min-p", type=float, default=0.0, help="only tokens at least this multiple as likely as the likeliest")
    how.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: rather what is not there yet")
    how.add_argument("--seed", type=int, default=0)
    end = parser.add_argument_group("where to end; the model's end tokens always do")
    end.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    end.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--log-probabilities", action="store_true", help="tell each token's, of the model as it is")
    parser.add_argument(
        "--speculative", action="store_true",
        help="the MTP modules draft and the main model checks: the same distribution, greedily the same tokens",
    )  # fmt: skip
    parser.add_argument("--step", type=int, help="checkpoint of the run to use instead of the last")
    add_mesh(parser)
    args = parser.parse_intermixed_args()
    run_command(lambda: write(args))


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Take the fields of a mesh after all other words."""
    parser.add_argument(
        "parallel", nargs="*", metavar="parallel.FIELD=N",
        help="divide sequences and weights over all devices, as in training: data, fsdp, expert; for models that none holds",
    )  # fmt: skip


def write(args: argparse.Namespace) -> None:
    """Stream the first prompt's continuation, then print the others'; or write a file."""
    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.log_probabilities)
    _check_words(args)
    jax.config.update("jax_default_matmul_precision", "highest")
    model = load_model(Path(args.run), args.step, args.parallel)
    prompts = _Prompts(model, args.chat, args.system)
    if args.input is None:
        _write_prompts(args, model, prompts, sampling)
    else:
        _write_file(args, model, prompts, sampling)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse what cannot be sampled by; raises `UserError`."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    Sampling(temperature=temperature, top_p=top_p)


def _check_words(args: argparse.Namespace) -> None:
    if (args.input is None) != (args.output is None):
        raise UserError("--input and --output belong together: a file of prompts and a file for what is written")
    if args.input is not None and (args.prompt or args.prompt_ids):
        raise UserError("--input: give prompts in the file or on the command line, not both")
    if args.system is not None and not args.chat:
        raise UserError("--system: is the system's message in a chat; add --chat")
    if args.chat and args.input is None and not args.prompt:
        raise UserError("--chat: give the user's message by --prompt")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")


class _Prompts:
    """Turns what the user gives into tokens."""

    def __init__(self, model: LoadedModel, chat: bool, system: Optional[str]):
        self._model, self._chat, self._system = model, chat, system
        self._template: Optional[ChatTemplate] = None
        if chat:
            self._load_template()

    def of_text(self, text: str, where: str = "--prompt") -> list[int]:
        """Of a prompt, or with --chat of a message."""
        if self._chat:
            system = [] if self._system is None else [{"role": "system", "content": self._system}]
            return self._load_template().tokens([*system, {"role": "user", "content": text}])
        if self._model.tokenizer is None:
            raise UserError(f"{where}: {self._model.directory} has no tokenizer.json; give token ids instead of text")
        ids = self._model.tokenizer.encode(text, add_special_tokens=False).ids
        return self.of_ids(ids or list(self._model.ends[:1]), where)

    def of_ids(self, ids: list[Any], where: str) -> list[int]:
        """Token ids, checked."""
        vocab_size = self._model.config.vocab_size
        if not ids:
            raise UserError(f"{where}: a prompt needs at least one token")
        for token in ids:
            if not is_count(token) or token >= vocab_size:
                raise UserError(f"{where}: {shown(token)} is no token; the model knows 0 to {vocab_size - 1}")
        return ids

    def of_fields(self, fields: dict[str, Any], where: str) -> list[int]:
        """Of a line of a file."""
        if "messages" in fields:
            return self._load_template().tokens(as_messages(fields["messages"], where))
        form = "prompt" if "prompt" in fields else "prompt_ids"
        kind, name = (str, "text") if form == "prompt" else (list, "a list of token ids")
        if not isinstance(fields[form], kind):
            raise UserError(f"{where}: {form} is {shown(fields[form])}; {name} is expected")
        return self.of_text(fields[form], where) if form == "prompt" else self.of_ids(fields[form], where)

    def _load_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = load_chat_template(self._model.directory, self._model.tokenizer)
        return self._template


def _write_prompts(args: argparse.Namespace, model: LoadedModel, prompts: _Prompts, sampling: Sampling) -> None:
    titles = args.prompt or ([] if args.prompt_ids else [""])
    tokens = [prompts.of_text(text) for text in titles]
    for number, ids in enumerate(args.prompt_ids or []):
        try:
            numbers = [int(word) for word in ids.replace(",", " ").split()]
        except ValueError:
            raise UserError(f'--prompt-ids "{ids}": token ids are expected, as in "5 9 2"') from None
        tokens.append(prompts.of_ids(numbers, f"--prompt-ids number {number + 1}"))
        titles = [*titles, f"[{' '.join(map(str, numbers))}]"]
    if args.chat:
        titles = ["" for _ in titles]
    rows = [Continuation(ids, args.max_new_tokens, model.ends, model.tokenizer, args.stop) for ids in tokens]
    generator = Generator(model.config, model.variables, len(rows), args.speculative, division=model.division)
    print(titles[0], end="", flush=True)
    for _ in generator.run(rows, sampling, args.seed):
        print(rows[0].news(), end="", flush=True)
    print(_ids(rows[0], model))
    _tell(rows[0])
    for title, row in zip(titles[1:], rows[1:]):
        print(f"---\n{title}{row.text}{_ids(row, model)}")
        _tell(row)
    _tell_share(generator)


def _ids(row: Continuation, model: LoadedModel) -> str:
    """Of a model without a tokenizer, the tokens."""
    return "" if model.tokenizer is not None else " " + " ".join(map(str, row.tokens))


def _tell(row: Continuation) -> None:
    if row.log_probabilities:
        print("log-probabilities: " + " ".join(f"{value:.3f}" for value in row.log_probabilities))


def _tell_share(generator: Generator) -> None:
    if generator.drafted:
        print(f"drafts: {generator.accepted:,} of {generator.drafted:,} accepted, {_share(generator):.0%}")


def _share(generator: Generator) -> float:
    return generator.accepted / generator.drafted


def _write_file(args: argparse.Namespace, model: LoadedModel, prompts: _Prompts, sampling: Sampling) -> None:
    if not args.output.absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: there is no directory {args.output.absolute().parent}")
    requests = read_requests(args.input, prompts.of_fields, model.config.max_position_embeddings)
    size = min(args.batch_size, len(requests))
    multiple = LENGTH_MULTIPLE if size == len(requests) else FILE_LENGTH_MULTIPLE
    generator = Generator(model.config, model.variables, size, args.speculative, multiple, model.division)

    def continuation(prompt: Iterable[int]) -> Continuation:
        return Continuation(list(prompt), args.max_new_tokens, model.ends, model.tokenizer, args.stop)

    tokens = write_all(generator, requests, continuation, sampling, args.seed, size, args.output)
    print(f"{args.output}: {len(requests):,} prompts continued by {tokens:,} tokens")
    _tell_share(generator)


if __name__ == "__main__":
    main()
