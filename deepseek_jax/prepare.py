"""Turn raw documents into a packed data set: `python -m deepseek_jax.prepare --config data_sample`.

The story: read everything that there is, drop what was there before, judge what is left and tell its domain, train a
tokenizer or take one, turn documents into tokens, mix the domains, pack. OUT then holds train-*.arrow and
held_out-*.arrow, tokenizer.json, signatures.npy (for a later --against), report.json, report.png, dropped.jsonl and
prepared.json, which is written last. `data.path=OUT` trains on it. An interrupted run goes on at the shards that it lacks.
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from deepseek_jax.config import PrepareConfig, load_config, presets
from deepseek_jax.data import stages
from deepseek_jax.data.dedup import EXACT, WIDTH, find_originals
from deepseek_jax.data.division import plan_reading
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.domains import DOMAINS
from deepseek_jax.data.infilling import OWN, find_marks
from deepseek_jax.data.mixing import Mixed, mix_documents, shares_of
from deepseek_jax.data.report import REPORT, quantiles, write_report
from deepseek_jax.data.shards import MANIFEST, PARTS, SIGNATURES, TOKENIZER, open_shard, read_manifest, write_manifest
from deepseek_jax.data.shuffle import permute
from deepseek_jax.data.sources import DATASET, PYTHON, Piece
from deepseek_jax.data.stages import Settings
from deepseek_jax.data.tokenizer import DEEPSEEK_WORDS, end_of_document_id, find_tokenizer, largest_id, train_tokenizer
from deepseek_jax.errors import run_command, write_atomically

WORK, FINGERPRINT = "work", "fingerprint.json"
TOKENIZER_CHARACTERS = 2**27
"""What a tokenizer is trained on at most."""
SAMPLES = 20
"""Dropped documents shown of each rule."""

MapShards = Callable[[str, Callable[[Any], Any], Sequence[Any]], list[Any]]
"""(title, function, tasks) -> results in the order of the tasks; function and tasks can be pickled."""


def main() -> None:
    """Parse the command line and prepare."""
    parser = argparse.ArgumentParser(
        prog="python -m deepseek_jax.prepare",
        description="Deduplicate, filter, classify, mix, tokenise and pack text.",
        epilog="example: python -m deepseek_jax.prepare --config data_sample prepare.input=[texts/,more.jsonl.zst] "
        "prepare.mix.math=0 prepare.out=data/mine; then train with data.path=data/mine",
    )
    parser.add_argument("--config", required=True, help=f"a .yaml file or a preset ({', '.join(presets())})")
    parser.add_argument(
        "--against", action="append", default=[], metavar="DIR", help="a prepared set whose documents count as seen"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad input instead of counting it")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields of the config to change")
    args = parser.parse_intermixed_args()

    def start() -> None:
        config = load_config(args.config, args.overrides).prepare
        prepare(dataclasses.replace(config, against=[*config.against, *args.against]), args.strict)

    run_command(start)


def prepare(config: PrepareConfig, strict: bool = False, map_shards: Optional[MapShards] = None) -> dict[str, Any]:
    """Prepare `config.out`, and return its report.

    Args:
        strict: stop at the first bad input.
        map_shards: runs the stages' functions over shards; None takes processes on this machine.

    Raises:
        UserError: for anything the user can mend; what is done so far stays for the next time.
    """
    out = Path(config.out).expanduser()
    groups = plan_reading(config.input, config.shard_bytes)
    fingerprint = _fingerprint(config, groups)
    if (out / MANIFEST).exists():
        if read_manifest(out)["fingerprint"] != fingerprint:
            raise DataError(f"{out}: holds a set prepared from other text or settings; give another prepare.out, or remove it")
        print(f"{out}: is prepared already")
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        _stop_at(report["faults"]["first"] if strict else [])
        return report
    settings = Settings(_work_directory(out, fingerprint), config, strict)
    run = map_shards or partial(map_in_processes, config.workers)
    watch = _Watch()

    read = watch("read", lambda: run("reading", partial(stages.read_group, settings), list(enumerate(groups))))
    _stop_at([fault for told in read for fault in told["faults"]] if strict else [])  # of a run before this one
    parts = [part for told in read for part in told["parts"]]
    names = [part["name"] for part in parts]
    if not names:
        raise DataError(f"{', '.join(config.input)}: no document in it; {_first_fault(read)}")
    counts = [part["documents"] for part in parts]
    firsts = np.cumsum([0, *counts])[:-1].tolist()

    watch("sign", lambda: run("signatures", partial(stages.sign_part, settings), names))
    duplicates = watch("deduplicate", lambda: _deduplicate(settings, names, counts))
    tasks = list(zip(names, firsts))
    judged = watch("judge", lambda: run("judging", partial(stages.judge_part, settings), tasks))
    tokenizer = watch("tokenizer", lambda: _make_tokenizer(settings, names))
    encoded = watch("tokenise", lambda: run("tokenising", partial(stages.encode_part, settings), tasks))
    lengths, mixed, held_out = watch("mix", lambda: _plan(settings, names))
    shards = {part: [path.stem for path in sorted((settings.work / stages.PLAN).glob(f"{part}-*.npy"))] for part in PARTS}
    packing = [(name, names) for part in PARTS for name in shards[part]]
    packed = dict(zip((name for name, _ in packing),
                      watch("pack", lambda: run("packing", partial(stages.pack_shard, settings), packing))))  # fmt: skip

    report = _report(read, duplicates, judged, encoded, lengths, mixed, held_out, packed, watch.seconds)
    samples = [sample for rule in report["dropped"] for sample in _samples(judged, rule)]
    write_report(out, report, samples, lengths)
    _finish(settings, out, names, tokenizer, fingerprint, {part: [packed[name] for name in shards[part]] for part in PARTS})
    _tell(out, report)
    return report


def map_in_processes(workers: Optional[int], title: str, function: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
    """`function` of each task, in so many processes, with a bar on the terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(f"{title:>12}"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"), TimeRemainingColumn())
    count = min(workers or os.cpu_count() or 1, len(tasks))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=len(tasks))
        if count <= 1:
            results = []
            for task in tasks:
                results.append(function(task))
                progress.advance(bar)
            return results
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, context, initializer=_begin_worker) as pool:
            futures = [pool.submit(function, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.advance(bar)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    console.print("stopping when the shards in work are done; the same command goes on from there")
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            return [future.result() for future in futures]


def _begin_worker() -> None:
    """Ctrl-C is the first process's to handle, and the cores are the workers' to share."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"


class _Watch:
    """How long each step of the story took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = step()
        self.seconds[name] = round(time.perf_counter() - begin, 3)
        return result


def _fingerprint(config: PrepareConfig, groups: list[list[Piece]]) -> str:
    """What the result depends on; files by path, size and time of change."""

    def state(name: str) -> list[Any]:
        if name.startswith(PYTHON):
            return [name, platform.python_version()]
        if name.startswith(DATASET) or name == "deepseek":
            return [name]
        stat = Path(name).expanduser().stat()
        return [name, stat.st_size, stat.st_mtime_ns]

    if config.tokenizer and config.tokenizer != "deepseek" and not Path(config.tokenizer).expanduser().exists():
        raise DataError(f"{config.tokenizer}: no such file; prepare.tokenizer must be a tokenizer.json, deepseek or null")
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("out", "workers")}
    names = dict.fromkeys(piece.name for group in groups for piece in group)
    files = [state(name) for name in (*names, *([config.tokenizer] if config.tokenizer else []))]
    earlier = [read_manifest(Path(path))["fingerprint"] for path in config.against]
    return hashlib.sha256(json.dumps([settings, files, earlier]).encode()).hexdigest()


def _work_directory(out: Path, fingerprint: str) -> Path:
    """Where the stages' results lie; those of other text or settings are removed."""
    work = out / WORK
    path = work / FINGERPRINT
    if work.exists() and (not path.exists() or json.loads(path.read_text()) != fingerprint):
        shutil.rmtree(work)
    if path.exists():
        print(f"{out}: going on with what was done before")
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(fingerprint))
    return work


def _stop_at(faults: list[str]) -> None:
    if faults:
        raise DataError(f"{faults[0]}; {stages.STRICT}")


def _first_fault(read: list[dict[str, Any]]) -> str:
    faults = [fault for told in read for fault in told["faults"]]
    return f"the first of what could not be read: {faults[0]}" if faults else "give text"


def _deduplicate(settings: Settings, names: list[str], counts: list[int]) -> dict[str, int]:
    """Write of each document the number of its original, or -1; and tell how many copies there are of which kind."""
    earlier = [np.load(Path(path).expanduser() / SIGNATURES, mmap_mode="r") for path in settings.config.against]
    before = sum(map(len, earlier))
    path = settings.work / SIGNATURES
    rows = np.lib.format.open_memmap(path, "w+", np.uint32, (before + sum(counts), WIDTH))
    start = 0
    for found in (*earlier, *(np.load(settings.work / stages.SIGNED / f"{name}.npy", mmap_mode="r") for name in names)):
        rows[start : start + len(found)] = found
        start += len(found)
    originals = find_originals(rows, before, settings.config.near_duplicate_threshold)
    np.save(settings.work / stages.ORIGINALS, originals[before:])
    copies = np.flatnonzero(originals >= 0)
    roots = originals[copies]
    exact = int((rows[copies, :EXACT] == rows[roots, :EXACT]).all(axis=1).sum())
    _, groups = np.unique(roots, return_counts=True)
    return {"copies": len(copies), "exact": exact, "near": len(copies) - exact, "of earlier sets": int((roots < before).sum()),
            "most of one document": int(groups.max(initial=0))}  # fmt: skip


def _make_tokenizer(settings: Settings, names: list[str]) -> Tokenizer:
    """The one that the config names, or one trained on documents that stay, spread over all parts."""
    path, config = settings.work / stages.TOKENIZER, settings.config
    if path.exists():
        return Tokenizer.from_file(str(path))
    if config.tokenizer:
        tokenizer = find_tokenizer(config.tokenizer)
    else:
        marks = len(OWN) if config.fim_rate else 0
        tokenizer = train_tokenizer(_spread_texts(settings, names), config.vocab_size - marks, DEEPSEEK_WORDS)
        if marks:
            tokenizer.add_special_tokens(list(OWN))
    end_of_document_id(tokenizer)
    if config.fim_rate:
        find_marks(tokenizer)
    write_atomically(path, tokenizer.to_str())
    return tokenizer


def _spread_texts(settings: Settings, names: list[str]) -> Iterator[str]:
    share = TOKENIZER_CHARACTERS // len(names)
    for name in names:
        room = share
        for _, row in stages.kept_texts(settings, name):
            yield row["text"][:room]
            room -= len(row["text"])
            if room <= 0:
                break


def _plan(settings: Settings, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, Mixed], dict[str, int]]:
    """Which documents go into which shard, written as files.

    Returns:
        By domain the lengths of all documents, what mixing did to it, and the tokens held out of it.
    """
    config = settings.config
    lengths, domains = [], []
    for name in names:
        kept, found = stages.kept_rows(settings, name)
        domains.append(found["domain"][kept])
        lengths.append(np.diff(open_shard(settings.work / stages.ENCODED / f"{name}.arrow").ends))
    bases = np.cumsum([0, *map(len, lengths)])[:-1]
    np.save(settings.work / stages.BASES, bases)
    of_all, domain = np.concatenate(lengths), np.concatenate(domains)
    held_out = np.zeros(len(of_all), bool)
    for number, name in enumerate(DOMAINS):
        own = np.flatnonzero(domain == number) if getattr(config.mix, name) else np.zeros(0, np.int64)
        count = max(round(len(own) * config.held_out_fraction), 1) if len(own) > 1 else 0
        held_out[own[permute(np.arange(count), len(own), config.seed, 2)]] = True
    folder = settings.work / stages.PLAN
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for part in PARTS:
        chosen = np.flatnonzero(held_out == (part == "held_out"))
        if part == "train":
            order, mixed = mix_documents(domain[chosen], of_all[chosen], DOMAINS, shares_of(dataclasses.asdict(config.mix)),
                                         config.tokens, config.max_repetition, config.seed)  # fmt: skip
        else:  # as much as there is, to judge by
            order = permute(np.arange(len(chosen)), len(chosen), config.seed)
            told = {name: int(of_all[chosen[domain[chosen] == number]].sum()) for number, name in enumerate(DOMAINS)}
        if not len(order):
            why = {
                "train": "no document is left to train on; give more text",
                "held_out": "no domain of the mix has a second document, to hold out; give a long text in several files",
            }
            raise DataError(f"{config.out}: {why[part]}, or lower "
                            f"prepare.quality_threshold={config.quality_threshold}")  # fmt: skip
        numbers = chosen[order]
        shard = np.cumsum(of_all[numbers]) // (config.shard_bytes // 2)
        for i, piece in enumerate(np.split(numbers, np.flatnonzero(np.diff(shard)) + 1)):
            np.save(folder / f"{part}-{i:05d}.npy", piece)
    return {name: of_all[domain == number] for number, name in enumerate(DOMAINS)}, mixed, told


def _report(read: list, duplicates: dict[str, int], judged: list, encoded: list, lengths: dict[str, np.ndarray],
            mixed: dict[str, Mixed], held_out: dict[str, int], packed: dict[str, dict[str, Any]],
            seconds: dict[str, float]) -> dict[str, Any]:  # fmt: skip
    """All that is known of what was done."""
    reasons, rules, unique = Counter[str](), Counter[str](), Counter[str]()
    stayed, tokens, infilled = Counter[str](), Counter[str](), Counter[str]()
    parts = [part for told in read for part in told["parts"]]
    total = sum(part["bytes"] for part in parts)
    for told in read:
        reasons.update(told["reasons"])
    for told in judged:
        rules.update(told["rules"])
        unique.update(told["unique"])
    for told in encoded:
        stayed.update(told["documents"])
        tokens.update(told["tokens"])
        infilled.update(told["infilled"])
    everything = max(sum(tokens.values()), 1)
    return {
        "documents": {"read": sum(part["documents"] for part in parts), "unique": sum(unique.values()),
                      "good": sum(stayed.values()), "packed": sum(shard["documents"] for shard in packed.values())},
        "bytes": total,
        "tokens": {"before mixing": sum(tokens.values()),
                   "train": sum(domain.tokens for domain in mixed.values()), "held_out": sum(held_out.values())},
        "duplicates": duplicates,
        "dropped": {"copy": duplicates["copies"], **dict(rules.most_common())},
        "faults": {"count": sum(reasons.values()), "reasons": dict(reasons.most_common()),
                   "first": [fault for told in read for fault in told["faults"]][: stages.FAULTS_KEPT]},
        "domains": {name: {"unique": unique[name], "good": stayed[name], "tokens_before_mixing": tokens[name],
                           "share_in": tokens[name] / everything, **mixed[name].as_dict(), "infilled": infilled[name],
                           "lengths": quantiles(lengths[name])} for name in DOMAINS},
        "held_out": held_out,
        "seconds": seconds,
        "megabytes_per_second": {name: round(total / 1e6 / max(taken, 1e-9), 2) for name, taken in seconds.items()},
    }  # fmt: skip


def _samples(judged: list[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
    found = [sample for told in judged for sample in told["samples"].get(rule, [])]
    return found[:: -(-len(found) // SAMPLES) or 1] if found else []


def _finish(settings: Settings, out: Path, names: list[str], tokenizer: Tokenizer, fingerprint: str,
            shards: dict[str, list[dict[str, Any]]]) -> None:  # fmt: skip
    """Put the files in their place, the manifest last, and remove what the stages left."""
    write_atomically(out / TOKENIZER, tokenizer.to_str())
    kept = [np.flatnonzero(stages.kept_rows(settings, name)[0]) for name in names]
    rows = np.lib.format.open_memmap(out / SIGNATURES, "w+", np.uint32, (sum(map(len, kept)), WIDTH))
    start = 0
    for name, own in zip(names, kept):
        rows[start : start + len(own)] = np.load(settings.work / stages.SIGNED / f"{name}.npy", mmap_mode="r")[own]
        start += len(own)
    rows.flush()
    for part in PARTS:
        for shard in shards[part]:
            source = settings.work / stages.PACKED / shard["file"]
            if source.exists():  # moved already, where an interrupted run goes on here
                os.replace(source, out / shard["file"])
    end = end_of_document_id(tokenizer)
    told = {part: [{key: shard[key] for key in ("file", "tokens", "documents")} for shard in shards[part]] for part in PARTS}
    write_manifest(out, fingerprint, told, end_of_document=end, vocab_size=largest_id(tokenizer) + 1)
    shutil.rmtree(settings.work)


def _tell(out: Path, report: dict[str, Any]) -> None:
    documents, tokens = report["documents"], report["tokens"]
    print(f"{out}: {documents['read']:,} documents read ({report['bytes'] / 1e6:.1f} MB), {documents['unique']:,} not copies, "
          f"{documents['good']:,} good enough")  # fmt: skip
    if report["faults"]["count"]:
        print(f"bad input: {report['faults']['count']:,}, the first {report['faults']['first'][0]}")
    for name, domain in report["domains"].items():
        mixed = f"{domain['share']:6.1%} of the mix (asked {domain['asked']:.0%}), read {domain['repetition']:.2f} times"
        print(f"  {name:12} {domain['good']:8,} documents {domain['tokens_before_mixing']:13,} tokens; {mixed}")
    print(f"{tokens['train']:,} tokens to train on, {tokens['held_out']:,} held out; more in report.json and report.png")
    print(f"train on it with data.path={out} and model.vocab_size={read_manifest(out)['vocab_size']} or more")


if __name__ == "__main__":
    main()
