"""Train and use a model from Python: a thin layer over what the commands use.

from deepseek_jax import DeepSeekModel, DeepSeekTrainer

model = DeepSeekModel(hidden_size=256, num_attention_heads=4, num_hidden_layers=4)
history = DeepSeekTrainer(model, learning_rate=1e-3).train(texts, epochs=1, batch_size=8, max_length=256)
ids = model.generate(model.tokenizer.encode("def ").ids, max_new_tokens=100, temperature=0.8)
print(model.tokenizer.decode(ids))
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import jax
from tokenizers import Tokenizer

from deepseek_jax.checkpoint.adapters import with_adapters_merged
from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.checkpoint.pretrained import save_pretrained
from deepseek_jax.checkpoint.tokenizer_files import TextFiles, read_text_files
from deepseek_jax.config import ModelConfig
from deepseek_jax.config.sizes import model_from
from deepseek_jax.data.texts import as_prompts
from deepseek_jax.generate import check_sampling
from deepseek_jax.generation.chat import as_messages, load_chat_template
from deepseek_jax.generation.continuation import Continuation
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling import Sampling
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.planning.figures import ParameterCount, count_parameters
from deepseek_jax.precision.fp8 import require_fp8
from deepseek_jax.train import train
from deepseek_jax.training.fitting import History, plan_run, trainer_fields
from deepseek_jax.training.loading import load_model, load_run
from deepseek_jax.training.loop import Interrupted
from deepseek_jax.training.step import init_variables


class DeepSeekModel:
    """A model, and the tokenizer that it was trained with.

    Attributes:
        config: its sizes and forms.
        tokenizer: of the library `tokenizers`; None before there is one.
        accepted_share: of the drafts of the last `generate`, those that the main model took; None where none drafted.
    """

    accepted_share: Optional[float] = None
    _variables: Optional[dict[str, Any]]
    _make: Callable[[], dict[str, Any]]
    """The variables, where there are none yet."""
    _on_mesh: Optional[tuple[dict[str, Any], Division]]
    _generators: dict[tuple[int, bool], Generator]

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
        self._fits_vocabulary = preset is None and "vocab_size" not in sizes
        self._take(None, None)
        self._make = jax.jit(partial(init_variables, self.config, seed))

    @classmethod
    def from_pretrained(cls, path: str | Path, parallel: Optional[Mapping[str, int]] = None) -> "DeepSeekModel":
        """The model in a Hugging Face directory, or in a run of `deepseek_jax.train` or `DeepSeekTrainer`.

        A name on the hub, `org/name` or `org/name@revision`, is fetched.

        Args:
            parallel: fields of `ParallelConfig`, such as {"expert": 8}, to `generate` on a mesh of all devices: the weights
                go straight to them, and to the host only if something else asks for them.

        Raises:
            UserError: one line naming what cannot be read.
        """
        directory, model = local_directory(path), cls.__new__(cls)
        loaded = load_model(directory, parallel=[f"parallel.{name}={size}" for name, size in (parallel or {}).items()])
        model.config, model._fits_vocabulary = loaded.config, False
        model._take(None if loaded.division else loaded.variables, str(path))
        model._make = lambda: load_model(directory).variables
        if loaded.division is not None:
            model._on_mesh = loaded.variables, loaded.division
        return model

    @property
    def variables(self) -> dict[str, Any]:
        """The weights as the module `DeepseekV3` takes them: {"params": ..., "router_state": ...}."""
        if self._variables is None:
            self._variables = jax.device_get(self._make())
        return self._variables

    def count_parameters(self) -> ParameterCount:
        """How many numbers the model learns: in all, active per token, and in MTP modules."""
        return count_parameters(self.config)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation, [{"role": "user", "content": "..."}, ...], as token ids up to where the assistant's answer begins.

        Raises:
            UserError: one line on the messages, or why there is no chat template that can be used.
        """
        template = load_chat_template(self._texts.directory, self.tokenizer)
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
            The prompt's ids and those after it, as a list; of several a list of lists. A token that ends a text ends a
            sequence.

        Raises:
            UserError: when the ids are none, or do not fit the context; or when there are no MTP modules that could draft.
        """
        if self.config.precision == "fp8":
            require_fp8()
        check_sampling(max_new_tokens, temperature, top_p)
        prompts, is_batch = as_prompts(ids, self.config.vocab_size)
        if (kind := (len(prompts), speculative)) not in self._generators:
            variables, division = self._on_mesh or (self.variables, None)
            self._generators = {kind: Generator(self.config, variables, *kind, division=division)}
        generator = self._generators[kind]
        generator.drafted = generator.accepted = 0
        limit = min(max_new_tokens, self.config.max_position_embeddings + 1 - max(map(len, prompts)))
        rows = [Continuation(prompt, limit, self._texts.ends) for prompt in prompts]
        with jax.default_matmul_precision("highest"):
            for _ in generator.run(rows, Sampling(temperature=temperature, top_p=top_p), seed):
                pass
        self.accepted_share = generator.accepted / generator.drafted if generator.drafted else None
        sequences = [row.prompt + row.tokens for row in rows]
        return sequences if is_batch else sequences[0]

    def save_pretrained(self, directory: str | Path, dtype: str = "float32") -> None:
        """Write a Hugging Face directory with weights in float32, bfloat16 or fp8, and the tokenizer.

        It is a `deepseek_v3`, which transformers loads; of forms that no such model has, it is ours alone to read.

        Raises:
            UserError: one line naming file or tensor; `directory` is then as it was before.
        """
        texts = None if self.tokenizer is None else self._texts.directory
        save_pretrained(directory, self.config, self.variables, dtype, texts)

    def _take(self, variables: Optional[dict[str, Any]], source: Optional[str]) -> None:
        """Be the model of these weights, which are those of a run, a Hugging Face directory or a name on its hub."""
        self._variables, self._on_mesh, self._generators, self._source = variables, None, {}, source
        self._texts = TextFiles(None, (), None, Path()) if source is None else read_text_files(local_directory(source))
        self.tokenizer: Optional[Tokenizer] = self._texts.tokenizer


class DeepSeekTrainer:
    """Trains a `DeepSeekModel` on texts or conversations.

    Args:
        model: changed by training.
        tokenizer: ours or any of Hugging Face's, see `data.texts.as_tokenizer`; None keeps the model's own, or trains one
            on the texts if it has none.
        precision: of the products with weights, such as "bfloat16" or "fp8"; None leaves the model's.
        lora: fields of `LoraConfig`, such as {"rank": 16}: low-rank adapters learn beside the weights. Afterwards the model
            has them merged; the run in save_path has them apart, for `deepseek_jax.convert --adapter`.
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
            save_path: becomes a run directory as `deepseek_jax.train` makes them, with the checkpoints, the metrics and the
                picture of the loss; by default a new one in runs/.

        Raises:
            UserError: one line on what the user can mend; on Ctrl-C too, after saving. The model is then as of that step.
        """
        model = self.model
        asked = model.config if self._precision is None else dataclasses.replace(model.config, precision=self._precision)
        of_train = {**self._asked["train"], "batch_size": batch_size, "sequence_length": max_length}
        fits = model._fits_vocabulary and model._variables is None
        config = plan_run(asked, {**self._asked, "train": of_train}, train_texts, self._tokenizer, epochs, save_path, fits,
                          model._source)  # fmt: skip
        model.config, run_dir = config.model, Path(config.run_dir)
        try:
            state = train(config, variables=model.variables)
        except Interrupted:
            model._take(load_run(run_dir)[2], str(run_dir))
            raise
        variables = jax.device_get({"params": state.params, "router_state": state.router_state})
        model._take(variables | {"params": with_adapters_merged(variables["params"], config.lora)}, str(run_dir))
        return History(run_dir)
