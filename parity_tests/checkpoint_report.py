"""`python -m parity_tests --checkpoint DIR`: reports on one checkpoint in several frameworks, or on two checkpoints."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from deepseek_jax.checkpoint.hf_config import read_hf_config
from deepseek_jax.checkpoint.hf_source import HuggingFaceSource
from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from parity_tests.comparison import TOLERANCES, difference
from parity_tests.layerwise import Ending, Row, frameworks, opened, run

SHOWN = 10
"""So many of the tensors that differ are named."""


class Parted(UserError):
    """Frameworks, or checkpoints, that should be alike and are not."""


def report_frameworks(name: str, text: Path | None, length: int, precision: str) -> None:
    """Run a checkpoint layer by layer in every framework and print where they part.

    Raises:
        Parted: naming the first layer at which one is further from the sibling than rounding, or chooses other experts.
        UserError: one line, if the checkpoint or the text cannot be read.
    """
    directory, console = local_directory(name), Console(width=100)
    source = opened(directory, precision)
    for note in source.notes:
        print(note)
    tokens = _tokens(directory, text, length, source.config.vocab_size, source.config.max_position_embeddings)
    each = frameworks(source.config, tokens.shape[1], read_hf_config(directory).content)
    first, *others = each
    print(f"{tokens.shape[1]} tokens {'of ' + str(text) if text else 'at random'}, {precision}, against the {first}")
    table = Table(title="Hidden states after each layer: largest difference, and tokens with other experts")
    table.add_column("layer")
    for other in others:
        for heading in (f"{other}: rel.", "abs.", "choices"):
            table.add_column(heading)
    parted, allowed, endings = None, TOLERANCES[precision], {}
    rows, total = run(source, tokens, each), source.config.num_hidden_layers + 1
    for row in track(rows, "layers", total, console=Console(stderr=True), transient=True):
        if isinstance(row, Row):
            numbers = [(f"{row.apart[o].relative:.1e}", f"{row.apart[o].absolute:.1e}", str(row.others[o])) for o in others]
            wrong = [o for o in others if row.others[o] or not row.apart[o].relative <= allowed]
            table.add_row(str(row.layer), *sum(numbers, ()), style="bold red" if wrong else None)
            parted = parted or (wrong and f"{wrong[0]} parts from the {first} at layer {row.layer}") or None
        else:
            endings = row
    console.print(table)
    console.print(_predictions(endings))
    for other in others:
        if not parted and not endings[other].logits.relative <= allowed:
            parted = f"{other} parts from the {first} at the logits"
    if parted:
        raise Parted(f"{directory}: {parted}; {precision} allows {allowed:.0e}, and the same experts")


def _predictions(endings: dict[str, Ending]) -> Table:
    table = Table(title="Predictions")
    for heading in ("", "logits: rel.", "abs.", "KL, nats", "loss, nats", "other greedy tokens"):
        table.add_column(heading)
    for name, ending in endings.items():
        numbers = (f"{ending.logits.relative:.1e}", f"{ending.logits.absolute:.1e}", f"{ending.divergence:.1e}")
        table.add_row(name, *numbers, f"{ending.loss:.6f}", str(ending.greedy))
    return table


def _tokens(directory: Path, text: Path | None, length: int, vocabulary: int, context: int) -> np.ndarray:
    if not 2 <= length <= context:
        raise UserError(f"--length {length}: must be from 2 to max_position_embeddings={context}")
    if text is None:
        return np.random.default_rng(0).integers(0, vocabulary, (1, length))
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{text}: not UTF-8 text") from None
    ids = load_tokenizer(directory).encode(content, add_special_tokens=False).ids[:length]
    if len(ids) < 2:
        raise UserError(f"{text}: {len(ids)} tokens; at least 2 are needed")
    return np.array([ids])


def report_against(name: str, other: str) -> None:
    """Compare two checkpoints tensor by tensor.

    Raises:
        Parted: if they are not equal, apart from dtypes.
        UserError: one line, if one cannot be read.
    """
    one, another = (HuggingFaceSource(local_directory(path)) for path in (name, other))
    places, found = ({place.name: place for place in layout(source.config)} for source in (one, another))
    missing = [f"{tensor} (only in {name})" for tensor in places.keys() - found] + [
        f"{tensor} (only in {other})" for tensor in found.keys() - places
    ]
    counts, differing = {"identical": 0, "equal after dtype": 0, "of other shapes": 0}, []
    shared = [tensor for tensor in places if tensor in found]
    for tensor in track(shared, "tensors", console=Console(stderr=True), transient=True):
        ours, theirs = one.read(places[tensor]), another.read(found[tensor])
        if ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes():
            counts["identical"] += 1
        elif ours.shape != theirs.shape:
            counts["of other shapes"] += 1
            differing.append((float("inf"), f"{tensor}: {list(ours.shape)} and {list(theirs.shape)}"))
        elif np.array_equal(ours.astype(np.float32), theirs.astype(np.float32)):
            counts["equal after dtype"] += 1
        else:
            apart = difference(ours, theirs)
            differing.append((apart.relative, f"{tensor}: {apart.absolute:.1e}, {apart.relative:.1e} of the largest"))
    worst = [line for _, line in sorted(differing, reverse=True)]
    print(", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count or kind == "identical"))
    for title, lines in (("differ", worst), ("missing", sorted(missing))):
        if lines:
            print(f"{len(lines):,} {title}:", *lines[:SHOWN], *(["..."] if len(lines) > SHOWN else []), sep="\n  ")
    if differing or missing:
        raise Parted(f"{name} and {other}: {len(differing):,} tensors differ and {len(missing):,} are in one alone")
