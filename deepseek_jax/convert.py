"""Carry a model between JAX and Hugging Face: `python -m deepseek_jax.convert SRC DST`.

A run directory, or one step of its checkpoints, becomes a Hugging Face directory that `transformers`
loads; a Hugging Face directory becomes a run directory that `train --resume` and
`generate` load. Which it is, is seen from what is there. One tensor at a time is in memory.
"""

import argparse
import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from deepseek_jax.checkpoint.forms import FORMS, SCALE_SUFFIX
from deepseek_jax.checkpoint.hf_config import carried_content, require_known_type
from deepseek_jax.checkpoint.hf_files import INDEX_FILE, SINGLE_FILE, has_weights
from deepseek_jax.checkpoint.hf_source import HuggingFaceSource
from deepseek_jax.checkpoint.hf_writer import encoded, planned, write_huggingface
from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.checkpoint.orbax_source import OrbaxSource
from deepseek_jax.checkpoint.orbax_step import AVERAGE, META, VARIABLES, stacked_arrays
from deepseek_jax.checkpoint.peft_writer import require_exportable, write_adapter
from deepseek_jax.checkpoint.run_writer import FIRST_STEP, write_run
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.safetensors_writer import parse_size, plan_shards
from deepseek_jax.checkpoint.source import Source, summarize
from deepseek_jax.checkpoint.staging import staged_directory
from deepseek_jax.checkpoint.tensors import CheckpointError, TensorSpec
from deepseek_jax.checkpoint.tokenizer_files import TOKENIZER_JSON, UNREAD, texts_directory
from deepseek_jax.config import load_config
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import run_command


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="python -m deepseek_jax.convert",
        description="Turn a run directory or one step of its checkpoints into a Hugging Face directory, or a Hugging "
        "Face directory into a run directory.",
        epilog="example: python -m deepseek_jax.convert runs/quickstart my-model --dtype bfloat16 --verify",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="directory, or on the hub org/name[@revision]")
    parser.add_argument("destination", metavar="DST", type=Path, help="must not exist yet, or be empty")
    parser.add_argument("--dtype", choices=FORMS, help="default: what SRC is stored in")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default: 5GB)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be read and written")
    parser.add_argument("--verify", action="store_true", help="read what was written and compare it with SRC")
    parser.add_argument("--adapter", action="store_true", help="of a run with lora.rank its adapter alone, as peft reads it")
    parser.add_argument("--ema", action="store_true", help="of a run with train.ema_decay the average of its weights")
    parser.add_argument("--allow-non-finite", action="store_true", help="rescue what is left of a model with NaN or infinity")
    args = parser.parse_args()
    _share_one_heap()
    jax.config.update("jax_platforms", "cpu")  # what else is there stays free for others
    options = (args.dtype, args.max_shard_size, args.dry_run, args.verify, args.allow_non_finite, args.ema)
    if args.adapter:
        run_command(lambda: export_adapter(args.source, args.destination, args.dry_run))
        return
    run_command(lambda: convert(args.source, args.destination, *options))


def _share_one_heap() -> None:
    """Let all threads take memory from one heap, and keep what is freed there, where the C library is glibc.

    Each of tensorstore's threads would otherwise keep what it freed on a heap of its own: on 6 GB that
    had grown by 180 MB, and was slower. And a tensor's memory, asked of the kernel each time, costs as much as its copy.
    """
    arena_max, mmap_threshold, trim_threshold = -8, -3, -1
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(arena_max, 1)
        library.mallopt(mmap_threshold, 16 * 2**20)
        library.mallopt(trim_threshold, 32 * 2**20)


def convert(
    source: str | Path,
    destination: Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    dry_run: bool = False,
    verify: bool = False,
    allow_non_finite: bool = False,
    ema: bool = False,
) -> None:
    """Convert `source` to `destination`, which appears whole or not at all; see `main` for the arguments.

    Raises:
        UserError: one line naming file and tensor; `destination` is then as it was before.
    """
    max_shard_bytes = parse_size(max_shard_size)
    source = local_directory(source)
    if _is_huggingface(source):
        if ema:
            raise CheckpointError(f"{source}: --ema is of a run that has train.ema_decay; this is a Hugging Face directory")
        _from_huggingface(HuggingFaceSource(source, allow_non_finite), source, destination, dtype, dry_run, verify)
    else:
        step = source if _holds(source, VARIABLES) else _last_step(source)
        _to_huggingface(
            OrbaxSource(step, allow_non_finite, AVERAGE if ema else VARIABLES), source, step, destination, dtype,
            max_shard_bytes, dry_run, verify,
        )  # fmt: skip


def export_adapter(source: Path, destination: Path, dry_run: bool = False) -> None:
    """Write what was learnt beside the weights of a run, or of one of its steps, alone: peft puts it onto the same weights.

    Raises:
        UserError: one line; `destination` is then as it was before.
    """
    if _is_huggingface(source):
        raise CheckpointError(f"{source}: is a Hugging Face directory; an adapter comes from a run that has lora.rank")
    step = source if _holds(source, VARIABLES) else _last_step(source)
    weights = OrbaxSource(step)
    require_exportable(weights, step)
    print(weights.summary)
    if dry_run:
        print("dry run: nothing was written")
        return
    config = step.absolute().parent.parent / "config.yaml"
    with staged_directory(destination) as partial:
        count, left_out = write_adapter(partial, weights, load_config(config).init_from if config.is_file() else None)
    missing = f"; {left_out} of MTP modules left out, which transformers does not have" if left_out else ""
    print(f"{destination}: {count} tensors of an adapter written{missing}")


def _is_huggingface(path: Path) -> bool:
    """Whether `path` is a Hugging Face directory; if not, it is a run or a step of one.

    Raises:
        CheckpointError: if it is none of these, or more than one.
    """
    kinds = {
        "a Hugging Face directory": _holds(path, "config.json") and has_weights(path),
        "a run directory": _holds(path, "config.yaml") and _holds(path, "checkpoints"),
        "a step of a run's checkpoints": _holds(path, VARIABLES) and _holds(path, META),
    }
    found = [kind for kind, is_it in kinds.items() if is_it]
    if len(found) == 1:
        return found == ["a Hugging Face directory"]
    if found:
        raise CheckpointError(f"{path}: looks like {' and '.join(found)}; move one of them elsewhere")
    raise CheckpointError(
        f"{path}: there is no checkpoint: neither config.json with {SINGLE_FILE} or {INDEX_FILE} (Hugging Face), nor "
        f"config.yaml with checkpoints (a run), nor {VARIABLES} with {META} (a step of a run's checkpoints)"
    )


def _holds(directory: Path, name: str) -> bool:
    return (directory / name).exists()


def _from_huggingface(
    source: HuggingFaceSource, path: Path, destination: Path, dtype: str | None, dry_run: bool, verify: bool
) -> None:
    if dtype == "fp8" and source.form != "fp8":
        raise CheckpointError(
            "--dtype fp8: a run directory holds float32, bfloat16 or float16; fp8 is for writing a Hugging Face directory"
        )
    # Float32 holds what codes and scales stand for; the scales are kept beside, to write the same codes again.
    stored = "float32" if "fp8" in (dtype, source.form) and dtype in (None, "fp8") else dtype or source.form
    stored = stored if dtype else _holding(source, stored)
    specs = [
        TensorSpec(array.name, "F32" if array.is_bias else FORMS[stored], array.shape)
        for array in stacked_arrays(source.config).values()
    ]
    print("\n".join([source.summary, *source.notes, _summary(destination, "orbax", specs)]))
    if _holds(path, TOKENIZER_JSON):
        load_tokenizer(path)  # one that is broken is named here, and not when the run is to write
    else:
        unread = next((f", only {name}, which goes along" for name in UNREAD if _holds(path, name)), "")
        print(f"{path}: no {TOKENIZER_JSON}{unread}; generation will need one in {destination}, or take --prompt-ids")
    if dry_run:
        print("dry run: nothing was written")
        return
    nbytes = sum(spec.nbytes for spec in specs)
    with staged_directory(destination) as partial:
        with _progress("writing", nbytes) as advance:
            write_run(partial, destination, source, stored, path, advance, keep_form=dtype is None or source.form == "fp8")
        if verify:
            with _progress("verifying", nbytes) as advance:
                _verify_step(partial / "checkpoints" / str(FIRST_STEP), source, stored, advance)
    print(f"{destination}: written{' and verified' if verify else ''}")


def _holding(source: Source, stored: str) -> str:
    """The dtype `stored`, or float32 if some weights are in another; routers' biases are float32 in any case."""
    biases = {place.name for place in layout(source.config) if place.is_bias}
    others = {dtype for name, dtype in source.dtypes.items() if name not in biases and not name.endswith(SCALE_SUFFIX)}
    return "float32" if others - {FORMS[stored]} else stored


def _verify_step(step: Path, source: Source, dtype: str, advance: Callable[[int], None]) -> None:
    written = OrbaxSource(step, allow_non_finite=True)  # what there is has been looked at
    _same(written.config == source.config, step, "config")
    for place in layout(source.config):
        if place.is_copy:
            continue
        came, expected = written.read(place), source.read(place)
        _same_bits(came, expected.astype(came.dtype), step, place.name)
        kept, scales = written.scales(place), source.scales(place)
        _same((kept is None) == (scales is None), step, f"scales of {place.name}")
        if kept is not None and scales is not None:
            _same_bits(kept, scales, step, f"scales of {place.name}")
        advance(came.nbytes)


def _to_huggingface(
    source: OrbaxSource,
    path: Path,
    step: Path,
    destination: Path,
    dtype: str | None,
    max_shard_bytes: int,
    dry_run: bool,
    verify: bool,
) -> None:
    require_known_type(source.config, str(path), carried_content(_tokenizer(step), source.config))
    form = dtype or source.form
    specs = planned(source, form)
    shards = len(plan_shards(specs, max_shard_bytes))
    print(source.summary)
    print(f"{_summary(destination, f'Hugging Face, {form}', specs)} in {shards:,} file{'s' * (shards > 1)}")
    tokenizer = _tokenizer(step)
    if tokenizer is None:
        print(f"{path}: no {TOKENIZER_JSON}; {destination} will have none")
    if dry_run:
        print("dry run: nothing was written")
        return
    nbytes = sum(spec.nbytes for spec in specs)
    with staged_directory(destination) as partial:
        with _progress("writing", nbytes) as advance:
            write_huggingface(partial, source, form, tokenizer, max_shard_bytes, advance)
        if verify:
            with _progress("verifying", nbytes) as advance:
                _verify_huggingface(partial, source, form, advance)
    print(f"{destination}: written{' and verified' if verify else ''}")


def _verify_huggingface(directory: Path, source: Source, form: str, advance: Callable[[int], None]) -> None:
    HuggingFaceSource(directory, allow_non_finite=True)
    written = SafetensorsDirectory(directory)
    for spec, expected in zip(planned(source, form), encoded(source, form), strict=True):
        _same_bits(written.read(spec.name), expected, directory, spec.name)
        advance(spec.nbytes)


def _same_bits(came: np.ndarray, expected: np.ndarray, where: Path, what: str) -> None:
    equal = (came.dtype, came.shape) == (expected.dtype, expected.shape)
    came, expected = (np.ascontiguousarray(array).view(np.uint8) for array in (came, expected))
    _same(equal and np.array_equal(came, expected), where, what)


def _same(equal: bool, where: Path, what: str) -> None:
    if not equal:
        raise CheckpointError(f"{where}: {what}: what was read back is not what was written")


def _last_step(run: Path) -> Path:
    # Orbax writes a step under another name and renames it when it is whole.
    steps = [entry for entry in (run / "checkpoints").iterdir() if entry.name.isdecimal() and entry.is_dir()]
    if not steps:
        raise CheckpointError(f"{run / 'checkpoints'}: no checkpoint is complete")
    return max(steps, key=lambda entry: int(entry.name))


def _tokenizer(step: Path) -> Path | None:
    """The folder of the tokenizer of the run that `step` belongs to: what came with its weights, or its own."""
    run = step.absolute().parent.parent
    if not _holds(run, "config.yaml"):
        return None
    folder = texts_directory(run)
    return folder if folder != run or _holds(run, TOKENIZER_JSON) else None


def _summary(destination: Path, kind: str, specs: list[TensorSpec]) -> str:
    dtypes = Counter(spec.dtype for spec in specs)
    return summarize(f"{destination}: {kind}", dtypes, sum(spec.nbytes for spec in specs))


@contextmanager
def _progress(title: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, moved by the number of bytes done."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=nbytes)
        yield lambda count: progress.advance(task, count)


if __name__ == "__main__":
    main()
