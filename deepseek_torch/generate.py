"""Let a model write: `python -m deepseek_torch.generate RUN --prompt "Once" --max-new-tokens 100`.

RUN is a run directory of `deepseek_torch.train`, or any Hugging Face directory of a `deepseek_v3` with
its tokenizer. Prompts are read in one pass; then each step computes one token per sequence over a cache
of latents, kv_lora_rank + qk_rope_head_dim numbers per token and layer.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from deepseek_jax.checkpoint.hf_config import CONFIG_JSON
from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.data.tokenizer import end_of_document_id, load_tokenizer
from deepseek_jax.errors import UserError, run_command
from deepseek_torch.model.decoding import decode, prefill
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.pretrained import load_pretrained
from deepseek_torch.sampling import Sampler, check_sampling
from deepseek_torch.speculative import Drafts, continuation, require_modules
from deepseek_torch.train import MODELS
from deepseek_torch.training.checkpoint import saved_steps


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(prog="python -m deepseek_torch.generate", description="Let a model write.")
    parser.add_argument("run", help="run directory of deepseek_torch.train, a Hugging Face directory, or a name on the hub")
    parser.add_argument("--prompt", action="append", help="text to go on from; repeat it for several at once")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample among the likeliest tokens of this total")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speculative", action="store_true", help="the MTP modules draft and the main model checks")
    args = parser.parse_args()
    run_command(lambda: write(args))


def write(args: argparse.Namespace) -> None:
    """Print every prompt with its continuation."""
    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    directory = model_directory(local_directory(args.run))
    model, tokenizer = load_pretrained(directory), load_tokenizer(directory)
    end = end_of_document_id(tokenizer)
    texts = args.prompt or [""]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids or [end] for text in texts]
    asked, share = (args.max_new_tokens, end, args.temperature, args.top_p, args.seed), None
    if args.speculative:
        rows, share = generate_by_drafts(model, prompts, *asked)
    else:
        rows = [list(row) for row in zip(*generate(model, prompts, *asked))]
    for number, (text, tokens) in enumerate(zip(texts, rows)):
        separator = "---\n" if number else ""
        written = tokenizer.decode([token for token in tokens if token != end], skip_special_tokens=False)
        print(f"{separator}{text}{written}")
    if share is not None:
        print(f"drafts: {share:.0%} accepted")


def model_directory(path: Path) -> Path:
    """`path` itself if it is a Hugging Face directory, else that of the last model of the run at `path`."""
    if (path / CONFIG_JSON).is_file():
        return path
    steps = saved_steps(path / MODELS)
    if not steps:
        raise UserError(f"{path}: neither a Hugging Face directory nor a run of deepseek_torch.train with a saved model")
    return path / MODELS / str(steps[-1])


@torch.no_grad()
def generate(
    model: DeepseekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_of_document: int | None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[list[int]]:
    """Continue several prompts at once, token by token.

    Args:
        prompts: token ids, at least one each; their lengths may differ.
        end_of_document: ends a sequence; None never does.
        temperature: 0 takes the likeliest token.

    Yields:
        The next token of every sequence; `end_of_document` for those that have ended. Stops when all
        have, after max_new_tokens, or at the end of the model's context.

    Raises:
        UserError: when a prompt does not fit the context.
    """
    model.eval()  # every choice of an expert is served
    lengths = [len(prompt) for prompt in prompts]
    longest, steps = max(lengths), _steps(model, prompts, max_new_tokens)
    padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    positions = torch.tensor(lengths)
    sampler = Sampler(temperature, top_p, seed)
    end = -1 if end_of_document is None else end_of_document  # -1 is no token
    ended = [False] * len(prompts)
    logits, cache = prefill(model, padded, positions, cache_length=longest + steps)
    for step in range(1, steps + 1):
        chosen = sampler.draw_rows(logits)
        told = [end if over else token for over, token in zip(ended, chosen.tolist())]
        yield told
        ended = [token == end for token in told]
        if all(ended) or step == steps:
            return
        logits, cache = decode(model, cache, chosen, positions)
        positions = positions + 1


def generate_by_drafts(
    model: DeepseekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_of_document: int | None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[list[list[int]], float | None]:
    """The same by speculative decoding: greedily the same tokens, else of the same distribution.

    Returns:
        The new tokens of each sequence, up to `end_of_document`; and the share of the drafts that were taken.

    Raises:
        UserError: when a prompt does not fit the context, or there are no MTP modules that could draft.
    """
    require_modules(model)
    model.eval()
    steps, sampler, drafts = _steps(model, prompts, max_new_tokens), Sampler(temperature, top_p, seed), Drafts()
    end = -1 if end_of_document is None else end_of_document
    return [continuation(model, prompt, steps, end, sampler, drafts) for prompt in prompts], drafts.share


def _steps(model: DeepseekV3, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """How many tokens can be written after all of them."""
    context, longest = model.config.max_position_embeddings, max(map(len, prompts))
    if longest > context:
        raise UserError(f"the prompt has {longest} tokens; the context (max_position_embeddings) is {context}")
    return min(max_new_tokens, context + 1 - longest)


if __name__ == "__main__":
    main()
