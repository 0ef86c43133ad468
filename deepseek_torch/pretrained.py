"""Load a Hugging Face directory into this package's model, and save one from it.

The model's state dict has the checkpoint's names, so nothing is renamed or transposed. Tensors are read by
the safetensors library and dequantised here, with no code of the JAX sibling's on their way: what both
read from one directory can be compared. What config.json means is read once for both, like any config.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deepseek_jax.checkpoint.hf_config import CONFIG_JSON, read_hf_config, to_config_json
from deepseek_jax.checkpoint.hf_files import INDEX_FILE, SINGLE_FILE, model_tensors, mtp_depth, weight_files
from deepseek_jax.checkpoint.staging import disk_errors, staged_directory
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.tokenizer_files import write_json, write_tokenizer
from deepseek_jax.checkpoint.torch_reader import load
from deepseek_jax.config import ModelConfig
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.precision.fp8 import dequantize_blocks, quantize_blocks
from deepseek_torch.training.adapters import merged_state_dict

SCALE_SUFFIX = "_scale_inv"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.bfloat16}
"""What can be written, and the dtype of all but quantised weights and routers' biases."""
SCALES = (torch.float32, torch.float8_e8m0fnu)
"""What they are stored in; the latter holds powers of two."""
HIGHER_PRECISION = ("embed_tokens", "lm_head", "shared_head", "mlp.gate.", "shared_expert_gate", "eh_proj")
"""Matrices that the fp8 form leaves as they are."""
SHARD_BYTES = 5 * 10**9


def load_pretrained(directory: str | os.PathLike[str]) -> DeepseekV3:
    """The model in a Hugging Face `deepseek_v3` directory, its weights in float32 and its config as `.config`.

    Raises:
        UserError: one line naming the file, and the key or every tensor that is not as it should be.
    """
    directory = Path(directory)
    came, stored = read_hf_config(directory), _read(directory)
    names, _ = model_tensors(came, stored, str(directory))
    tensors = _dequantized(directory, {name: stored[under] for name, under in names.items()})
    depth, _ = mtp_depth(came.model, tensors, str(directory))
    config = replace(came.model, num_nextn_predict_layers=depth)
    _take_copies(directory, config, tensors)
    with torch.device("meta"):
        model = DeepseekV3(config)
    state_dict = model.state_dict()
    faults = [f"{name}: missing" for name in state_dict if name not in tensors]
    for name, tensor in tensors.items():
        expected = state_dict.get(name)
        if expected is None:
            faults.append(f"{name}: left over")
        elif expected.shape != tensor.shape:
            faults.append(f"{name}: {list(tensor.shape)} for {list(expected.shape)}")
    if faults:
        raise CheckpointError(f"{directory}: its tensors are not those of its config: {'; '.join(faults)}")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model


def save_pretrained(
    directory: str | os.PathLike[str],
    model: DeepseekV3,
    dtype: str = "float32",
    tokenizer: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory, which appears whole or not at all.

    Args:
        dtype: float32, bfloat16, float16 or fp8.
        tokenizer: a directory with a tokenizer.json, to go with it.

    Raises:
        UserError: one line naming file or tensor; what was at `directory` is then as it was.
    """
    if dtype not in FORMS:
        raise CheckpointError(f"dtype={dtype}: choose one of {', '.join(FORMS)}")
    with staged_directory(directory) as partial:
        _write(partial, dict(_encoded(model, dtype)), max_shard_bytes)
        tokenizer = None if tokenizer is None else Path(tokenizer)
        token_ids = write_tokenizer(partial, tokenizer, model.config.max_position_embeddings)
        write_json(partial / CONFIG_JSON, to_config_json(model.config, dtype, token_ids))


def _read(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the directory's files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(directory)[0]:
        found = _read_safetensors(path) if path.suffix == ".safetensors" else load(path)
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(f"{path}: given twice: {', '.join(sorted(twice))}")
        tensors |= found
    return tensors


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _dequantized(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float tensors only: what is float8, by its dtype, times its scales."""
    weights = {}
    for name, tensor in tensors.items():
        _require_finite(directory, name, tensor)
    for name in list(tensors):
        if name.removesuffix(SCALE_SUFFIX) in tensors and name.endswith(SCALE_SUFFIX):
            continue
        weight = tensors[name]
        if weight.dtype == torch.float8_e4m3fn:
            scales = tensors.get(name + SCALE_SUFFIX)
            shape = tuple(-(-size // 128) for size in weight.shape)
            if scales is None or scales.dtype not in SCALES or tuple(scales.shape) != shape:
                raise CheckpointError(f"{directory}: {name}: float8 without scales, float32 or E8M0, of shape {list(shape)}")
            scales = scales.float()
            if not (scales > 0).all():
                raise CheckpointError(f"{directory}: {name}{SCALE_SUFFIX}: scales must be positive")
            weight = dequantize_blocks(weight, scales)
        elif weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"{directory}: {name}: {weight.dtype} is not supported")
        elif name + SCALE_SUFFIX in tensors:
            raise CheckpointError(f"{directory}: {name}{SCALE_SUFFIX}: scales of a weight that is not float8")
        weights[name] = weight
    return weights


def _require_finite(directory: Path, name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinity, which make nonsense of all that follows."""
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if broken := int((~wide.isfinite()).sum()):
        raise CheckpointError(f"{directory}: {name}: {broken:,} of {tensor.numel():,} numbers are NaN or infinite")


def _copies(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Tensors of MTP layers that repeat one of the main model, and its name."""
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        yield f"{prefix}.embed_tokens.weight", EMBEDDING
        yield f"{prefix}.shared_head.head.weight", head


def _take_copies(directory: Path, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Remove the copies from `tensors`, where they must be there and equal."""
    head = tensors.pop(HEAD, None) if config.tie_word_embeddings else None
    if head is not None and not torch.equal(head, tensors[EMBEDDING]):
        raise CheckpointError(f"{directory}: {HEAD}: is not equal to {EMBEDDING}, though tie_word_embeddings is true")
    for copy, original in _copies(config):
        if copy not in tensors or original not in tensors:
            raise CheckpointError(f"{directory}: {copy if original in tensors else original}: missing")
        if not torch.equal(tensors.pop(copy), tensors[original]):
            raise CheckpointError(f"{directory}: {copy}: is not equal to {original}")


def _encoded(model: DeepseekV3, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint in the form `dtype`, by name."""
    tensors = {name: tensor.detach() for name, tensor in merged_state_dict(model).items()}
    tensors |= {copy: tensors[original] for copy, original in _copies(model.config)}
    for name, tensor in tensors.items():
        if broken := int((~tensor.isfinite()).sum()):
            raise CheckpointError(f"{name}: {broken:,} of {tensor.numel():,} numbers are NaN or infinite")
        if name.endswith("e_score_correction_bias"):
            yield name, tensor.float()
        elif dtype == "fp8" and tensor.ndim == 2 and not any(part in name for part in HIGHER_PRECISION):
            codes, scales = quantize_blocks(tensor)
            yield name, codes
            yield name + SCALE_SUFFIX, scales
        else:
            yield name, tensor.to(FORMS[dtype])


def _write(directory: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
    """One file, or several of at most `max_shard_bytes` with their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    free = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > free and shards[-1]:
            shards.append({})
            free = max_shard_bytes
        # A file may not hold two tensors that share memory, as copies do.
        shards[-1][name] = tensor.clone(memory_format=torch.contiguous_format)
        free -= tensor.nbytes
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        write_json(directory / INDEX_FILE, index)
    for file, shard in zip(names, shards):
        with disk_errors(directory / file):
            save_file(shard, directory / file, metadata={"format": "pt"})
