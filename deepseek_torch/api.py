"""Train and use a model from Python, as `deepseek_jax.api` does: a thin layer over what the commands use.

from deepseek_torch import DeepSeekModel, DeepSeekTrainer

model = DeepSeekModel(hidden_size=256, num_attention_heads=4, num_hidden_layers=4)
history = DeepSeekTrainer(model, learning_rate=1e-3).train(texts, epochs=1, batch_size=8, max_length=256)
ids = model.generate(model.tokenizer.encode("def ").ids, max_new_tokens=100, temperature=0.8)
print(model.tokenizer.decode(ids))
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from tokenizers import Tokenizer

from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.checkpoint.tokenizer_files import TOKENIZER_JSON
from deepseek_jax.config import ModelConfig
from deepseek_jax.config.sizes import model_from
from deepseek_jax.data.texts import as_prompts, continued
from deepseek_jax.data.tokenizer import end_of_document_id, load_tokenizer
from deepseek_jax.generation.chat import as_messages, load_chat_template
from deepseek_jax.training.fitting import History, plan_run, trainer_fields
from deepseek_jax.training.plot import plot_run
from deepseek_torch.generate import generate, generate_by_drafts, model_directory
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.pretrained import load_pretrained, save_pretrained
from deepseek_torch.sampling import check_sampling
from deepseek_torch.train import train
from deepseek_torch.training.adapters import merged_state_dict


class DeepSeekModel:
    """A model, and the tokenizer that it was trained with.

    Attributes:
        config: its sizes and forms.
        tokenizer: of the library `tokenizers`; None before there is one.
        accepted_share: of the drafts of the last `generate`, those that the main model took; None where none drafted.
    """

    accepted_share: Optional[float] = None

    def __init__(self, preset: Optional[str] = None, *, seed: int = 0, **sizes: Any):
        """A model with fresh weights, which are drawn when they are first needed.

        Args:
            preset: a preset's name or a .yaml file; without one, what `sizes` do not say follows from what they do.
            seed: of the weights.
            sizes: fields of `ModelConfig`, such as hidden_size=1024 or scoring_func="softmax".

        Raises:
            ConfigError: one line naming the field at fault.
        """
        self.config: ModelConfig = model_from(preset, sizes)
        self.tokenizer: Optional[Tokenizer] = None
        self._source: Optional[Path] = None
        self._seed = seed
        self._module: Optional[DeepseekV3] = None
        self._fits_vocabulary = preset is None and "vocab_size" not in sizes

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "DeepSeekModel":
        """The model in a Hugging Face directory, or the last of a run of `deepseek_torch.train` or `DeepSeekTrainer`.

        A name on the hub, `org/name` or `org/name@revision`, is fetched.

        Raises:
            UserError: one line naming what cannot be read.
        """
        directory, model = model_directory(local_directory(path)), cls.__new__(cls)
        model._module = load_pretrained(directory)
        model.config, model._seed, model._fits_vocabulary = model._module.config, 0, False
        model._take_source(directory)
        return model

    @property
    def module(self) -> DeepseekV3:
        """The PyTorch module with the weights."""
        if self._module is None:
            torch.manual_seed(self._seed)
            self._module = DeepseekV3(self.config)
        return self._module

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation, [{"role": "user", "content": "..."}, ...], as token ids up to where the assistant's answer begins.

        Raises:
            UserError: one line on the messages, or why there is no chat template that can be used.
        """
        template = load_chat_template(self._source or Path(), self.tokenizer)
        return template.tokens(as_messages(messages, "apply_chat_template"))

    def generate(
        self,
        ids: Any,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
        speculative: bool = False,
    ) -> list[Any]:
        """Go on from a prompt, or from several at once.

        Args:
            ids: token ids of a prompt, or several such: lists or arrays.
            temperature: 0 always takes the likeliest token.
            top_p: sample among the likeliest tokens of this total.
            speculative: let the MTP modules draft and the main model check: greedily the same tokens, else the same
                distribution; see `accepted_share`.

        Returns:
            The prompt's ids and those after it, as a list; of several a list of lists. The token that ends a document
            ends a sequence.

        Raises:
            UserError: when the ids are none, or do not fit the context; or when there are no MTP modules that could draft.
        """
        check_sampling(max_new_tokens, temperature, top_p)
        prompts, is_batch = as_prompts(ids, self.config.vocab_size)
        end = None if self.tokenizer is None else end_of_document_id(self.tokenizer)
        asked = (self.module, prompts, max_new_tokens, end, temperature, top_p, seed)
        if speculative:
            rows, self.accepted_share = generate_by_drafts(*asked)
            sequences = [prompt + row for prompt, row in zip(prompts, rows)]
        else:
            sequences, self.accepted_share = continued(prompts, generate(*asked), end), None
        return sequences if is_batch else sequences[0]

    def save_pretrained(self, directory: str | Path, dtype: str = "float32") -> None:
        """Write a Hugging Face directory with weights in float32, bfloat16 or fp8, and the tokenizer.

        It is a `deepseek_v3`, which transformers loads; of forms that no such model has, it is ours alone to read.

        Raises:
            UserError: one line naming file or tensor; `directory` is then as it was before.
        """
        save_pretrained(directory, self.module, dtype, None if self.tokenizer is None else self._source)

    def _take_source(self, directory: Path) -> None:
        """Be the model in that Hugging Face directory, with its tokenizer if it has one."""
        self._source = directory
        self.tokenizer = load_tokenizer(directory) if (directory / TOKENIZER_JSON).is_file() else None

    def _compute_as(self, config: ModelConfig) -> None:
        """The same weights in a module of `config`, if there are any, with no adapters beside them."""
        if self._module is not None:
            weights, self._module = merged_state_dict(self._module), DeepseekV3(config)
            self._module.load_state_dict(weights)
        self.config = config


class DeepSeekTrainer:
    """Trains a `DeepSeekModel` on texts or conversations.

    Args:
        model: changed by training.
        tokenizer: ours or any of Hugging Face's, see `data.texts.as_tokenizer`; None keeps the model's own, or trains one
            on the texts if it has none.
        precision: of the products with weights, such as "bfloat16" or "fp8"; None leaves the model's.
        lora: fields of `LoraConfig`, such as {"rank": 16}: low-rank adapters learn beside the weights, and are merged
            afterwards.
        chat_template: a Jinja file to render conversations by, for a tokenizer that has none, or instead of its own.
        fields: more fields of `TrainConfig`, such as warmup_steps=100 or weight_decay=0.01.

    Raises:
        ConfigError: for a field that `train` is given.
    """

    def __init__(
        self,
        model: DeepSeekModel,
        tokenizer: Any = None,
        learning_rate: float = 2e-4,
        precision: Optional[str] = None,
        lora: Optional[Mapping[str, Any]] = None,
        chat_template: Optional[str | Path] = None,
        **fields: Any,
    ):
        self.model, self._tokenizer = model, tokenizer
        self._precision, self._asked = precision, trainer_fields(learning_rate, lora, chat_template, fields)

    def train(
        self,
        train_texts: Iterable[str | Mapping[str, Any]],
        epochs: float = 1,
        batch_size: int = 8,
        max_length: int = 512,
        save_path: Optional[str | Path] = None,
    ) -> History:
        """Train, and show progress and evaluations along the way.

        Args:
            train_texts: texts; or conversations, {"messages": [{"role": "user", "content": "..."}, ...]} each, in which the
                assistant's words count. A small part is held out to evaluate on.
            epochs: how often to see each sequence of the rest.
            batch_size: sequences of a step.
            max_length: tokens of a sequence. Texts follow each other in them; conversations stay whole, or are cut there.
            save_path: becomes a run directory as `deepseek_torch.train` makes them, with the models, the metrics and a
                picture of the loss; by default a new one in runs/.

        Raises:
            UserError: one line on what the user can mend.
        """
        model = self.model
        asked = model.config if self._precision is None else dataclasses.replace(model.config, precision=self._precision)
        of_train = {**self._asked["train"], "batch_size": batch_size, "sequence_length": max_length}
        fits = model._fits_vocabulary and model._module is None
        source = None if model._source is None else str(model._source)
        config = plan_run(asked, {**self._asked, "train": of_train}, train_texts, self._tokenizer, epochs, save_path, fits,
                          source)  # fmt: skip
        model._compute_as(config.model)
        try:
            train(config, model.module)
        finally:
            model._compute_as(config.model)
        run_dir = Path(config.run_dir)
        model._take_source(model_directory(run_dir))
        plot_run(run_dir)
        return History(run_dir)
