"""What a preparation does with all shards at once, between the stages, which see one each.

Copies are found, the tokenizer made, the mix planned, the report written, and at the end the files put in their place.
"""

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from deepseek_jax.data import stages
from deepseek_jax.data.dedup import EXACT, WIDTH, find_originals
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.domains import DOMAINS
from deepseek_jax.data.infilling import OWN, find_marks
from deepseek_jax.data.mixing import Mixed, mix_documents, shares_of
from deepseek_jax.data.report import quantiles
from deepseek_jax.data.shards import PARTS, SIGNATURES, TOKENIZER, open_shard, write_manifest
from deepseek_jax.data.shuffle import permute
from deepseek_jax.data.stages import Settings
from deepseek_jax.data.tokenizer import DEEPSEEK_WORDS, end_of_document_id, find_tokenizer, largest_id, train_tokenizer
from deepseek_jax.errors import write_atomically

TOKENIZER_CHARACTERS = 2**27
"""What a tokenizer is trained on at most."""
SAMPLES = 20
"""Dropped documents shown of each rule."""


def deduplicate(settings: Settings, names: list[str], counts: list[int]) -> dict[str, int]:
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


def make_tokenizer(settings: Settings, names: list[str]) -> Tokenizer:
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


def plan_mix(settings: Settings, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, Mixed], dict[str, int]]:
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


def make_report(read: list, duplicates: dict[str, int], judged: list, encoded: list, lengths: dict[str, np.ndarray],
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


def dropped_samples(judged: list[dict[str, Any]], rules: Iterable[str]) -> list[dict[str, Any]]:
    """Of each rule up to SAMPLES documents that it dropped, spread over all."""
    found = ([sample for told in judged for sample in told["samples"].get(rule, [])] for rule in rules)
    return [sample for of_rule in found for sample in of_rule[:: -(-len(of_rule) // SAMPLES) or 1]]


def finish(settings: Settings, out: Path, names: list[str], tokenizer: Tokenizer, fingerprint: str,
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
