"""Write a run directory that `train --resume` and `generate` load, from a Hugging Face directory."""

import shutil
from collections.abc import Callable
from pathlib import Path

from deepseek_jax.checkpoint.orbax_writer import write_step
from deepseek_jax.checkpoint.source import Source
from deepseek_jax.checkpoint.staging import disk_errors
from deepseek_jax.checkpoint.tokenizer_files import COMPANIONS_FOLDER, TOKENIZER_JSON, keep_companions
from deepseek_jax.config import Config, DataConfig, to_yaml
from deepseek_jax.config.sizes import to_go_on

FIRST_STEP = 0


def write_run(
    directory: Path,
    final: Path,
    source: Source,
    dtype: str,
    companions: Path,
    progress: Callable[[int], None] = lambda nbytes: None,
    keep_form: bool = True,
) -> None:
    """Write config.yaml, the tokenizer and step 0 of the weights of `source`.

    Args:
        directory: empty; see `staged_directory`.
        final: where it will be; the config names it.
        dtype: float32, bfloat16 or float16, of the weights on disk; training reads all as float32.
        companions: the Hugging Face directory that the tokenizer's files are in.
        progress, keep_form: see `write_step`.

    Raises:
        UserError: one line, if anything cannot be read or written.
    """
    write_step(directory / "checkpoints" / str(FIRST_STEP), source, dtype, progress, keep_form)
    keep_companions(companions, directory / COMPANIONS_FOLDER)
    has_tokenizer = (directory / COMPANIONS_FOLDER / TOKENIZER_JSON).is_file()
    config = Config(
        model=source.config,
        # Not the run's own tokenizer.json: preparing data replaces that one, and its date would change.
        data=DataConfig(tokenizer=str(final.absolute() / COMPANIONS_FOLDER) if has_tokenizer else None),
        train=to_go_on(source.config),
        run_dir=str(final),
    )
    with disk_errors(directory):
        if has_tokenizer:
            shutil.copyfile(directory / COMPANIONS_FOLDER / TOKENIZER_JSON, directory / TOKENIZER_JSON)
        (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
