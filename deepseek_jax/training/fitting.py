"""A run from texts in memory: its config, and what it told in the end. Both siblings' trainers stand on it."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

from tokenizers import Tokenizer

from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.checkpoint.tokenizer_files import TOKENIZER_JSON, keep_companions, texts_directory
from deepseek_jax.config import Config, ConfigError, ModelConfig, from_mapping
from deepseek_jax.data.loader import Windows, stride, window_length
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


def trainer_fields(
    learning_rate: float, lora: Optional[Mapping[str, Any]], chat_template: Optional[str | Path], fields: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What a trainer is made with, as sections of a config: `fields` are those of `TrainConfig`.

    Raises:
        ConfigError: when its `train` would replace one of them.
    """
    for name in GIVEN_TO_TRAIN.keys() & fields:
        raise ConfigError(f"DeepSeekTrainer: {name} is said to its train(), as {GIVEN_TO_TRAIN[name]}=")
    data = {} if chat_template is None else {"chat_template": str(chat_template)}
    return {"train": {"learning_rate": learning_rate, **fields}, "lora": dict(lora or {}), "data": data}


def plan_run(
    model: ModelConfig,
    asked: Mapping[str, Mapping[str, Any]],
    texts: Iterable[str | Mapping[str, Any]],
    tokenizer: Any,
    epochs: float,
    save_path: Optional[str | Path],
    fits_vocabulary: bool,
    source: Optional[str] = None,
) -> Config:
    """Write texts and tokenizer into a new run directory, tokenise them, and say what is to be run there.

    Args:
        asked: sections of a config, as `trainer_fields` gives them, with train's sequence_length and batch_size.
        texts: as for `write_texts`.
        tokenizer: as for `as_tokenizer`; None takes the source's, or trains one of model.vocab_size tokens on the texts.
        epochs: how often each training sequence is seen.
        save_path: the run directory; None takes the first free one of runs/python, runs/python-2 and so on.
        fits_vocabulary: whether model.vocab_size follows the tokenizer given.
        source: where the weights came from, a run, a Hugging Face directory or a name on its hub; None are fresh ones.

    Raises:
        UserError: one line on the field, the texts or the tokenizer at fault.
    """
    length, context = asked["train"]["sequence_length"], model.max_position_embeddings
    if length > context:
        raise ConfigError(f"max_length={length}: the model's max_position_embeddings is {context}")
    from_mapping({"model": dataclasses.asdict(model), **asked}, where="DeepSeekTrainer")  # before anything is written
    origin = None if source is None else local_directory(source)
    if tokenizer is None and origin is not None and not (origin / TOKENIZER_JSON).is_file():
        raise ConfigError(
            f"DeepSeekTrainer: {origin} has no {TOKENIZER_JSON}; give the tokenizer of its weights as tokenizer="
        )
    run_dir = _free_directory() if save_path is None else Path(save_path)
    if (run_dir / METRICS_FILE).exists():
        raise ConfigError(f"save_path={run_dir}: holds a run already; give another, or go on with its model, which "
                          "DeepSeekModel.from_pretrained reads")  # fmt: skip
    given = run_dir / "given"
    given.mkdir(parents=True, exist_ok=True)
    size, form = write_texts(texts, given / "texts.jsonl")
    data = {
        "format": form,
        "input": [str(given / "texts.jsonl")],
        "held_out_fraction": min(max(0.02, HELD_OUT_BYTES_PER_TOKEN * (length + 1) / size), 0.5),
        **asked["data"],
    }
    tokenizer = origin if tokenizer is None else tokenizer
    if tokenizer is not None:
        written = _give_tokenizer(tokenizer, given)
        data["tokenizer"] = str(given / TOKENIZER_JSON)
        if fits_vocabulary:
            count = -(-(largest_id(written) + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            model = dataclasses.replace(model, vocab_size=count)
    elif form == "chat":
        raise ConfigError("DeepSeekTrainer: conversations need a tokenizer with a chat template; give tokenizer=")

    def config_with(**fields: Any) -> Config:
        return from_mapping({"model": dataclasses.asdict(model), **asked, "data": data, "train": {**fields, **asked["train"]},
                             "run_dir": str(run_dir), "init_from": source}, where="DeepSeekTrainer")  # fmt: skip

    config = config_with()
    windows = Windows(prepare(config, run_dir).train, window_length(config), stride(config), seed=None)
    steps = max(round(epochs * len(windows) / config.train.batch_size), 1)
    often = max(steps // 10, 1)
    return config_with(steps=steps, warmup_steps=steps // 20, eval_every=often, checkpoint_every=5 * often)


def _give_tokenizer(tokenizer: Any, folder: Path) -> Tokenizer:
    """Write a tokenizer into `folder`, and beside it what came with it, such as a chat template."""
    written = as_tokenizer(tokenizer)
    if isinstance(tokenizer, str | Path):
        place = Path(tokenizer).expanduser()
        keep_companions(texts_directory(place if place.is_dir() else place.parent), folder)
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    written.save(str(folder / TOKENIZER_JSON))
    return written


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
