"""Which files of a Hugging Face directory hold the weights, and which of their tensors are the model's.

Free of any framework: both siblings open what is found here, each with code of its own.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from deepseek_jax.checkpoint.hf_config import HuggingFaceConfig
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import file_inside, read_object, shown
from deepseek_jax.config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_SINGLE_FILES = ("pytorch_model.bin", "pytorch_model.pt", "model.pt", "model.pth")
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"

_SHARD = re.compile(r"(.+)-(\d{1,9})-of-(\d{1,9})\.(safetensors|bin|pt|pth)", re.ASCII)
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.", re.ASCII)


def has_weights(directory: Path) -> bool:
    """Whether there are files of weights in a directory, whole or not."""
    known = (SINGLE_FILE, INDEX_FILE, *TORCH_SINGLE_FILES, TORCH_INDEX_FILE)
    return any(os.path.lexists(directory / name) for name in known) or bool(_shards(directory))


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of weights, and an index's map of tensors to their names if there is an index.

    Safetensors are preferred to what torch saved; shards need no index, if none of them is missing.

    Raises:
        CheckpointError: one line naming the directory or the file at fault.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory; give one that holds {SINGLE_FILE} or {INDEX_FILE}")
    for singles, index in (((SINGLE_FILE,), INDEX_FILE), (TORCH_SINGLE_FILES, TORCH_INDEX_FILE)):
        single = next((name for name in singles if os.path.lexists(directory / name)), None)
        if single and os.path.lexists(directory / index):
            raise CheckpointError(f"{directory}: holds both {single} and {index}; remove the stale one")
        if single:
            return [file_inside(directory, single, str(directory))], None
        if os.path.lexists(directory / index):
            return _indexed(directory, index)
        suffix = (".safetensors",) if index == INDEX_FILE else (".bin", ".pt", ".pth")
        shards = {stem: found for stem, found in _shards(directory).items() if stem[1].endswith(suffix)}
        if shards:
            return _complete(directory, shards), None
    raise CheckpointError(f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE} nor shards of a model")


def _shards(directory: Path) -> dict[tuple[str, str], dict[int, str]]:
    """Shards by what they have in common, beginning and end, and by number."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for name in sorted(os.listdir(directory)) if directory.is_dir() else ():
        if match := _SHARD.fullmatch(name):
            found.setdefault((match[1], f"-of-{match[3]}.{match[4]}"), {})[int(match[2])] = name
    return found


def _complete(directory: Path, shards: dict[tuple[str, str], dict[int, str]]) -> list[Path]:
    if len(shards) > 1:
        kinds = " and ".join(f"{shown(begin)}-*{end}" for begin, end in shards)
        raise CheckpointError(f"{directory}: holds shards of several models, {kinds}, and no index; remove the stale ones")
    ((begin, end), numbered) = next(iter(shards.items()))
    count = int(end.split("-of-")[1].split(".")[0])
    if sorted(numbered) != list(range(1, count + 1)):
        raise CheckpointError(f"{directory}: holds {len(numbered)} of the {count} shards {shown(begin)}-*{end}, and no index")
    return [file_inside(directory, numbered[number], str(directory)) for number in sorted(numbered)]


def _indexed(directory: Path, name: str) -> tuple[list[Path], dict[str, str]]:
    index = file_inside(directory, name, str(directory))
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensors to files")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: {shown(tensor)}: {shown(file)} is not the name of a file")
    return [file_inside(directory, file, str(index)) for file in dict.fromkeys(weight_map.values())], weight_map


def model_tensors(config: HuggingFaceConfig, names: Iterable[str], where: str) -> tuple[dict[str, str], list[str]]:
    """The model's own tensors, by their names without a prefix, with the names they are stored under.

    Returns:
        Those, and lines for people on what is left out.
    """
    names = list(names)
    own = {name.removeprefix(config.prefix): name for name in names if name.startswith(config.prefix)}
    derived = [name for name in own if _DERIVED.fullmatch(name)]
    kept = {name: stored for name, stored in own.items() if name not in derived}
    notes = []
    if len(own) < len(names):
        kinds = sorted({name.split(".")[0] for name in names if not name.startswith(config.prefix)})
        notes.append(f"{where}: {len(names) - len(own):,} tensors of other parts are left out: {', '.join(map(shown, kinds))}")
    if derived:
        notes.append(f"{where}: {len(derived):,} inv_freq buffers are left out, for they follow from the config")
    return kept, notes


def mtp_depth(model: ModelConfig, names: Iterable[str], where: str) -> tuple[int, list[str]]:
    """How many MTP layers there are tensors of, and a line for people if config.json says another number.

    Most conversions of V3 to bfloat16 drop that layer and not its number.
    """
    numbers = {int(match[1]) for match in map(_LAYER.match, names) if match}
    found, said = len([number for number in numbers if number >= model.num_hidden_layers]), model.num_nextn_predict_layers
    if found == said:
        return found, []
    tensors = f"there are tensors of {found}" if found else "there are no tensors of MTP layers"
    return found, [f"{where}: num_nextn_predict_layers is {said} and {tensors}; it is taken as {found}"]
