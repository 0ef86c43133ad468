"""A model for lm-evaluation-harness.

    python -m deepseek_jax.lm_eval --model deepseek_jax --model_args run=RUN --batch_size auto --tasks ...

All other words are the harness's own. From Python: `lm_eval.simple_evaluate(model=DeepSeekLM("runs/mine"), tasks=[...])`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import jax

from deepseek_jax.errors import UserError, run_command
from deepseek_jax.evaluate import BATCH_TOKENS, DEFAULT_CONTEXT
from deepseek_jax.generation.continuation import Continuation
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling import Sampling
from deepseek_jax.generation.scoring import Scorer
from deepseek_jax.training.loading import load_model

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm.auto import tqdm
except ModuleNotFoundError as error:  # pragma: no cover
    MISSING = "deepseek_jax.lm_eval needs the extra: pip install 'deepseek-jax[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {MISSING}")
    raise ModuleNotFoundError(MISSING) from error

MAX_NEW_TOKENS = 256
"""Of an answer, unless the task says."""


@register_model("deepseek_jax")
class DeepSeekLM(TemplateLM):
    """A run or a Hugging Face directory, scored on one device.

    Args:
        run: the directory.
        max_length: tokens that a model looks back on, at most.
        batch_size: sequences read at once.
        step: checkpoint of a run, by default the last.
    """

    def __init__(
        self, run: str, max_length: Optional[int] = None, batch_size: Optional[int | str] = None, step: Optional[int] = None,
        **other: Any,
    ):  # fmt: skip
        super().__init__()
        jax.config.update("jax_default_matmul_precision", "highest")
        model = load_model(Path(run), step)
        if model.tokenizer is None or model.begin is None:
            raise UserError(f"{run}: has no tokenizer.json with a token that begins or ends a text")
        self._model, self._tokenizer, self._begin = model, model.tokenizer, model.begin
        context = model.config.max_position_embeddings
        self.max_length = min(int(max_length or DEFAULT_CONTEXT), context)
        given = str(batch_size or "")  # may be "auto"
        self.batch_size = int(given) if given.isdigit() else max(BATCH_TOKENS // self.max_length, 1)
        self._scorer = Scorer(model.config, model.variables, self.max_length, self.max_length, self.batch_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._model.ends[0] if self._model.ends else self._begin

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        return self._begin

    def tok_encode(self, string: str, add_special_tokens: Optional[bool] = None, **other: Any) -> list[int]:
        """Text to token ids."""
        return self._tokenizer.encode(string, add_special_tokens=False).ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **other: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context, both as tokens: the log-likelihood, and whether it is the likeliest."""
        sequences = ([*context, *wanted][-(self.max_length + 1) :] for _, context, wanted in requests)
        results = []
        scores = tqdm(self._scorer.score(sequences), "scoring", len(requests), disable=disable_tqdm)
        for (_, _, wanted), scored in zip(requests, scores):
            count = len(wanted)
            results.append((-float(scored.nats[-count:].sum()), bool(scored.greedy[-count:].all())))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts."""
        sequences = ([self._begin, *self.tok_encode(request.args[0])] for request in requests)
        scores = tqdm(self._scorer.score(sequences), "scoring texts", len(requests), disable=disable_tqdm)
        return [-float(scored.nats.sum()) for scored in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, up to the strings that end it."""
        size = min(self.batch_size, len(requests))
        generator = Generator(self._model.config, self._model.variables, size, length_multiple=128)
        rows: list[Continuation] = []
        alike: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            context, wishes = request.args
            limit = min(int(wishes.get("max_gen_toks", MAX_NEW_TOKENS)), self.max_length - 1)
            stops = wishes.get("until") or []
            prompt = (self.tok_encode(context) or [self._begin])[-(self.max_length - limit) :]
            sampling = Sampling(float(wishes.get("temperature", 0)) if wishes.get("do_sample") else 0.0)
            stops = [stops] if isinstance(stops, str) else stops
            rows.append(Continuation(prompt, limit, self._model.ends, self._tokenizer, stops))
            alike.setdefault(sampling, []).append(number)
        with tqdm(total=len(requests), desc="writing", disable=disable_tqdm) as bar:
            for sampling, numbers in alike.items():
                numbers.sort(key=lambda number: len(rows[number].prompt))
                for start in range(0, len(numbers), size):
                    chosen = numbers[start : start + size]
                    for _ in generator.run([rows[number] for number in chosen], sampling, numbers=chosen):
                        pass
                    bar.update(len(chosen))
        return [row.text for row in rows]


def main() -> None:
    """The harness's command, which knows this model now."""
    from lm_eval.__main__ import cli_evaluate

    run_command(cli_evaluate)


if __name__ == "__main__":
    main()
