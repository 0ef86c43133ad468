"""A run from texts in memory: its config, and what it told in the end. Both siblings' trainers stand on it."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

from deepseek_jax.config import Config, ConfigError, ModelConfig, from_mapping
from deepseek_jax.data.loader import Windows, window_length
from deepseek_jax.data.packing import prepare
from deepseek_jax.data.texts import as_tokenizer, write_texts
from deepseek_jax.data.tokenizer import largest_id
from deepseek_jax.training.metrics import METRICS_FILE, read_metrics
from deepseek_jax.training.plot import PLOT_FILE

HELD_OUT_BYTES_PER_TOKEN = 6
"""More than a token has, so that a part held out is long enough for a sequence."""
VOCABULARY_MULTIPLE = 128
GIVEN_TO_TRAIN = {"batch_size": "batch_size", "sequence_length": "max_length"}
"""Fields of `TrainConfig` that a trainer's `train` has words for."""


def trainer_fields(learning_rate: float, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TrainConfig` that a trainer is made with.

    Raises:
        ConfigError: when its `train` would replace one of them.
    """
    for name in GIVEN_TO_TRAIN.keys() & fields:
        raise ConfigError(f"DeepSeekTrainer: {name} is said to its train(), as {GIVEN_TO_TRAIN[name]}=")
    return {"learning_rate": learning_rate, **fields}


def plan_run(
    model: ModelConfig,
    train: Mapping[str, Any],
    texts: Iterable[str],
    tokenizer: Any,
    epochs: float,
    save_path: Optional[str | Path],
    fits_vocabulary: bool,
) -> Config:
    """Write texts and tokenizer into a new run directory, tokenise them, and say what is to be run there.

    Args:
        train: fields of `TrainConfig`, sequence_length and batch_size among them.
        tokenizer: as for `as_tokenizer`; None trains one of model.vocab_size tokens on the texts.
        epochs: how often each training sequence is seen.
        save_path: the run directory; None takes the first free one of runs/python, runs/python-2 and so on.
        fits_vocabulary: whether model.vocab_size follows the tokenizer given.

    Raises:
        UserError: one line on the field, the texts or the tokenizer at fault.
    """
    length, context = train["sequence_length"], model.max_position_embeddings
    if length > context:
        raise ConfigError(f"max_length={length}: the model's max_position_embeddings is {context}")
    from_mapping({"model": dataclasses.asdict(model), "train": train}, where="DeepSeekTrainer")  # before anything is written
    run_dir = _free_directory() if save_path is None else Path(save_path)
    if (run_dir / METRICS_FILE).exists():
        raise ConfigError(f"save_path={run_dir}: holds a run already; give another, or go on with its model, which "
                          "DeepSeekModel.from_pretrained reads")  # fmt: skip
    if tokenizer is not None:
        tokenizer = as_tokenizer(tokenizer)
        if fits_vocabulary:
            size = -(-(largest_id(tokenizer) + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            model = dataclasses.replace(model, vocab_size=size)
    given = run_dir / "given"
    given.mkdir(parents=True, exist_ok=True)
    size = write_texts(texts, given / "texts.jsonl")
    data = {
        "input": [str(given / "texts.jsonl")],
        "held_out_fraction": min(max(0.02, HELD_OUT_BYTES_PER_TOKEN * (length + 1) / size), 0.5),
    }
    if tokenizer is not None:
        data["tokenizer"] = str(given / "tokenizer.json")
        tokenizer.save(data["tokenizer"])

    def config_with(**fields: Any) -> Config:
        return from_mapping({"model": dataclasses.asdict(model), "data": data, "train": {**fields, **train},
                             "run_dir": str(run_dir)}, where="DeepSeekTrainer")  # fmt: skip

    config = config_with()
    windows = Windows(prepare(config, run_dir).train, window_length(config), length, seed=None)
    steps = max(round(epochs * len(windows) / config.train.batch_size), 1)
    often = max(steps // 10, 1)
    return config_with(steps=steps, warmup_steps=steps // 20, eval_every=often, checkpoint_every=5 * often)


def _free_directory() -> Path:
    number, path = 2, Path("runs/python")
    while path.exists():
        number, path = number + 1, Path(f"runs/python-{number}")
    return path


class History:
    """What a run told: a line per step, held-out text, and a picture, which a notebook shows by itself.

    Attributes:
        steps: the lines of metrics.jsonl that tell of a step.
        evaluations: those that tell of held-out text.
        run_dir: where it all is.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        lines = read_metrics(run_dir)
        self.steps = [line for line in lines if "loss" in line]
        self.evaluations = [line for line in lines if "bits_per_byte" in line]

    @property
    def loss(self) -> list[float]:
        """The next token's, in nats, of every step."""
        return [line["next_token_loss"] for line in self.steps]

    @property
    def bits_per_byte(self) -> list[float]:
        """Of the held-out text, at every evaluation."""
        return [line["bits_per_byte"] for line in self.evaluations]

    @property
    def plot(self) -> Path:
        """The picture of both."""
        return self.run_dir / PLOT_FILE

    def __repr__(self) -> str:
        losses = f"loss {self.loss[0]:.3f} -> {self.loss[-1]:.3f}" if self.steps else "no step"
        bits = f", {self.bits_per_byte[-1]:.3f} bits per byte held out" if self.evaluations else ""
        return f"<History of {len(self.steps)} steps: {losses}{bits}; {self.plot}>"

    def _repr_png_(self) -> bytes:
        return self.plot.read_bytes()
