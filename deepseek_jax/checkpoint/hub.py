"""A name on the Hugging Face hub, `org/name` or `org/name@revision`, where a directory is asked for."""

import re
from pathlib import Path

from deepseek_jax.checkpoint.hf_config import CONFIG_JSON
from deepseek_jax.checkpoint.hf_files import has_weights
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import read_object, shown
from deepseek_jax.config.stages import last_stage

_NAME = re.compile(r"(?P<repository>[\w.-]{1,96}/[\w.-]{1,96})(@(?P<revision>[\w./-]{1,200}))?", re.ASCII)
ADAPTER_CONFIG = "adapter_config.json"
"""Of a directory that holds what peft puts beside a model's weights."""
_TEXTS = ["*.json", "*.jinja", "*.model", "merges.txt"]
"""Configs, indices and whatever belongs to a tokenizer."""
_WEIGHTS = (["*.safetensors"], ["*.bin", "*.pt", "*.pth"])
"""The latter only where there are none of the former."""


def local_directory(path: str | Path) -> Path:
    """`path` itself if there is such a thing here, or the directory in the cache to which a name on the hub was fetched.

    A run in stages stands for the last stage that has a checkpoint.
    Only the files that a model is read from are fetched; what an earlier attempt left is taken up. Without a network, or
    with HF_HUB_OFFLINE=1, what is in the cache is all there is.

    Raises:
        CheckpointError: one line, if it is neither here nor in the cache nor to be had, or an adapter alone.
    """
    path = Path(path).expanduser()
    match = _NAME.fullmatch(str(path))
    if path.exists() or match is None or Path(path.parts[0]).exists():
        return last_stage(_whole(path))
    repository, revision = match["repository"], match["revision"]
    for weights in _WEIGHTS:
        directory = _whole(_fetched(str(path), repository, revision, [*_TEXTS, *weights]))
        if has_weights(directory):
            return directory
    raise CheckpointError(f"{path}: {directory}, where the hub's files are kept, has no weights that can be read")


def _whole(directory: Path) -> Path:
    """The same, which is not an adapter alone."""
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / CONFIG_JSON).is_file():
        base = read_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise CheckpointError(
            f"{directory}: is an adapter without its model, {shown(base)}; merge it there by peft's merge_and_unload and give "
            "what that saves"
        )
    return directory


def _fetched(asked: str, repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # The subfolders of a repository are other models, or the same in another format.
        ignored = ["*/*"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except GatedRepoError:
        reason = "its owner must let you in: ask for it on its page, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or not for you: `hf auth login` if it is private"
    except RevisionNotFoundError:
        reason = f"the hub has no revision {revision}"
    except LocalEntryNotFoundError:
        reason = "it is not in the cache either, and the hub cannot be reached"
    except Exception as error:  # of the network's many kinds
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = f"it could not be fetched: {first[:200]}"
    raise CheckpointError(f"{asked}: there is no such directory, and as a name on the hub: {reason}")
