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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepseek_jax.config import PrepareConfig, load_config, presets
from deepseek_jax.data import across_shards, stages
from deepseek_jax.data.division import plan_reading
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.report import REPORT, write_report
from deepseek_jax.data.shards import MANIFEST, PARTS, read_manifest
from deepseek_jax.data.sources import DATASET, PYTHON, Piece
from deepseek_jax.data.stages import Settings
from deepseek_jax.errors import run_command, write_atomically

WORK, FINGERPRINT = "work", "fingerprint.json"

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
    duplicates = watch("deduplicate", lambda: across_shards.deduplicate(settings, names, counts))
    tasks = list(zip(names, firsts))
    judged = watch("judge", lambda: run("judging", partial(stages.judge_part, settings), tasks))
    tokenizer = watch("tokenizer", lambda: across_shards.make_tokenizer(settings, names))
    encoded = watch("tokenise", lambda: run("tokenising", partial(stages.encode_part, settings), tasks))
    lengths, mixed, held_out = watch("mix", lambda: across_shards.plan_mix(settings, names))
    shards = {part: [path.stem for path in sorted((settings.work / stages.PLAN).glob(f"{part}-*.npy"))] for part in PARTS}
    packing = [(name, names) for part in PARTS for name in shards[part]]
    packed = dict(zip((name for name, _ in packing),
                      watch("pack", lambda: run("packing", partial(stages.pack_shard, settings), packing))))  # fmt: skip

    report = across_shards.make_report(read, duplicates, judged, encoded, lengths, mixed, held_out, packed, watch.seconds)
    write_report(out, report, across_shards.dropped_samples(judged, report["dropped"]), lengths)
    across_shards.finish(
        settings, out, names, tokenizer, fingerprint, {part: [packed[name] for name in shards[part]] for part in PARTS}
    )
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
