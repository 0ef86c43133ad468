"""Raw documents to a prepared set: `deepseek_jax.prepare` from end to end, interrupted, and on bad input."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from deepseek_jax.config import ConfigError, MixConfig, PrepareConfig, from_mapping, load_config
from deepseek_jax.data import stages
from deepseek_jax.data.documents import DataError, read_documents
from deepseek_jax.data.infilling import OWN
from deepseek_jax.data.packing import is_prepared, open_prepared
from deepseek_jax.data.packing import prepare as prepare_run
from deepseek_jax.data.shards import open_part, open_shard, read_manifest
from deepseek_jax.data.sources import python_library
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.prepare import main, map_in_processes, prepare
from parity_tests.texts import one_line

HERE = partial(map_in_processes, 1)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Some of the standard library in several kinds of file, two domains of it labelled."""
    folder = tmp_path_factory.mktemp("raw")
    library = list(python_library())
    topics = [d.text for d in library if d.source.startswith("python:topics/") and 900 < len(d.text) < 20000][:56]
    modules = [d.text for d in library if not d.source.startswith("python:topics/") and 3000 < len(d.text) < 12000][:30]
    (folder / "code").mkdir()
    for number, text in enumerate(modules[:10]):
        (folder / "code" / f"{number:02d}.py").write_text(text)
    with gzip.open(folder / "more.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in modules[10:])
    with zstandard.open(folder / "math.jsonl.zst", "wt") as file:
        file.writelines(json.dumps({"text": text, "domain": "math", "source": "labelled"}) + "\n" for text in topics[:16])
    labels = ["multilingual"] * 10 + [None] * (len(topics) - 26)
    parquet.write_table(pa.table({"text": topics[16:], "domain": labels}), folder / "topics.parquet")
    return folder, [*modules, *topics]


def config_of(folder: Path, out: Path, **fields) -> PrepareConfig:
    return PrepareConfig(input=[str(folder)], out=str(out), vocab_size=600, shard_bytes=80_000, held_out_fraction=0.05,
                         workers=1, **fields)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    config = config_of(raw[0], tmp_path_factory.mktemp("prepared") / "set")
    return config, prepare(config, map_shards=HERE)


def documents(config: PrepareConfig, part: str) -> list[tuple[str, str]]:
    out = Path(config.out)
    tokenizer = load_tokenizer(out / "tokenizer.json")
    shards = [open_shard(out / shard["file"]) for shard in read_manifest(out)["shards"][part]]
    return [(tokenizer.decode(s.document(i)[:-1].tolist(), skip_special_tokens=False), s.domains[i].as_py())
            for s in shards for i in range(len(s))]  # fmt: skip


def files(config: PrepareConfig) -> dict[str, bytes]:
    names = ("*.arrow", "*.npy", "tokenizer.json", "prepared.json")
    return {path.name: path.read_bytes() for name in names for path in Path(config.out).glob(name)}


def test_every_token_is_of_its_text_and_domains_are_as_asked(raw, prepared):
    config, report = prepared
    train, held_out = documents(config, "train"), documents(config, "held_out")
    assert len(read_manifest(Path(config.out))["shards"]["train"]) > 1
    assert {text for text, _ in train + held_out} <= {*raw[1]}
    assert not {text for text, _ in train} & {text for text, _ in held_out} and {d for _, d in held_out} == {
        d for _, d in train
    }
    sizes = Counter()
    for shard in read_manifest(Path(config.out))["shards"]["train"]:
        opened = open_shard(Path(config.out, shard["file"]))
        for domain, length in zip(opened.domains.to_pylist(), np.diff(opened.ends)):
            sizes[domain] += int(length)
    for name, asked in (("general", 0.6), ("code", 0.2), ("math", 0.1), ("multilingual", 0.1)):
        assert abs(sizes[name] / sizes.total() - asked) < 0.01
        told = report["domains"][name]
        assert told["tokens"] == sizes[name] and told["repetition"] <= config.max_repetition and told["infilled"] == 0
        lengths = told["lengths"]
        assert 100 < lengths["shortest"] < lengths["10%"] < lengths["median"] < lengths["90%"] < lengths["longest"] < 10_000
    times = Counter(train)
    assert max(times.values()) <= 4 and max(n for (_, d), n in times.items() if d == "code") == 1 < max(times.values())
    assert (Path(config.out) / "report.png").stat().st_size > 10_000


def test_interrupted_and_resumed_is_as_uninterrupted(raw, prepared, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    done = Counter()

    def breaking(stop: tuple[str, int], title, function, tasks):
        results = []
        for number, task in enumerate(tasks):
            if (title, number) == stop:
                raise Stopped
            done[title] += 1
            results.append(function(task))
        return results

    config = replace(prepared[0], out=str(tmp_path / "set"))
    for stop in (("reading", 1), ("judging", 2), ("tokenising", 1), ("packing", 1)):
        with pytest.raises(Stopped):
            prepare(config, map_shards=partial(breaking, stop))
        assert not (tmp_path / "set" / "prepared.json").exists()
    before = done.copy()
    for name in ("read_source", "signatures", "judge", "encode"):  # what is done is not done again
        monkeypatch.setattr(stages, name, None)
    prepare(config, map_shards=partial(breaking, ("none", 0)))
    assert files(config) == files(prepared[0]) and done["packing"] > before["packing"]
    assert not (tmp_path / "set" / "work").exists()
    assert prepare(config, map_shards=None)["documents"] == prepared[1]["documents"]
    with pytest.raises(DataError, match="prepared from other text or settings"):
        prepare(replace(config, seed=1))


def test_against_an_earlier_set_nothing_is_new(raw, prepared, tmp_path):
    again = replace(prepared[0], out=str(tmp_path / "set"), against=[prepared[0].out])
    with pytest.raises(DataError, match=r"no document is left|no document of this domain"):
        prepare(again, map_shards=HERE)
    more = tmp_path / "more.txt"
    more.write_text("\n".join(f"A tale of {i} ships that {i * 7} men once saw pass by the harbour wall." for i in range(60)))
    more.with_name("other.txt").write_text(
        "\n".join(f"Whoever walks {i} miles finds inn {i * i} at road's end." for i in range(60))
    )
    again = replace(again, input=[*again.input, str(tmp_path / "*.txt")], mix=MixConfig(1, 0, 0, 0), held_out_fraction=0.5)
    report = prepare(again, map_shards=HERE)
    found = report["duplicates"]
    assert prepared[1]["documents"]["good"] <= found["of earlier sets"] == found["exact"] == found["copies"]
    assert report["documents"]["good"] == 2 and found["near"] == 0 and found["most of one document"] == 1


BAD = {
    "latin1.txt": "Grüße aus Köln".encode("latin-1"), "utf16.txt": "Text".encode("utf-16"), "empty.txt": b"",
    "cut.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 1000)[:-20], "fake.parquet": b"PAR1 no", "bad.jsonl":
    b'{"text": "first of it"}\n{"text": null}\n{"txt": "x"}\n{broken\n\xff\xfe\n[1]\n{"text": "  "}\n{"text": "\\ud800"}\n',
}  # fmt: skip


def test_bad_input_is_counted_and_named(raw, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, content in BAD.items():
        (bad / name).write_bytes(content)
    parquet.write_table(pa.table({"other": ["x"]}), bad / "column.parquet")
    config = config_of(raw[0], tmp_path / "set", mix=MixConfig(1, 1, 0, 0))
    config = replace(config, input=[*config.input, str(bad)])
    faults = prepare(config, map_shards=HERE)["faults"]
    assert faults["count"] == 13 == sum(faults["reasons"].values())
    for name, reason in (("latin1.txt", "not UTF-8"), ("utf16.txt", "zero byte"), ("empty.txt", "empty"),
                         ("cut.jsonl.gz:", "damaged"), ("fake.parquet", "not sound"), ("column.parquet", "no column text"),
                         ("bad.jsonl:2", "null"), ("bad.jsonl:3", "no text"), ("bad.jsonl:4", "not JSON"),
                         ("bad.jsonl:5", "not UTF-8"), ("bad.jsonl:6", "no JSON object"), ("bad.jsonl:7", "empty"),
                         ("bad.jsonl:8", "surrogate")):  # fmt: skip
        assert any(name in fault and reason in fault for fault in faults["first"]), (name, faults["first"])
    with pytest.raises(DataError) as error:
        prepare(config, strict=True, map_shards=HERE)  # what was passed over before is not passed over now
    one_line(error, faults["first"][0], "--strict")
    with pytest.raises(DataError) as error:
        prepare(replace(config, out=str(tmp_path / "strict"), input=[str(bad / "bad.jsonl")]), strict=True, map_shards=HERE)
    one_line(error, "bad.jsonl:2", "null in field text", "--strict")
    with pytest.raises(DataError) as error:
        prepare(replace(config, out=str(tmp_path / "nothing"), input=[str(bad / "latin1.txt")]), map_shards=HERE)
    one_line(error, "no document in it", "latin1.txt: not UTF-8")
    with pytest.raises(DataError) as error:
        prepare(replace(config, out=str(tmp_path / "one"), mix=MixConfig(0, 1, 0, 0), input=[str(raw[0] / "code/03.py")]),
                map_shards=HERE)  # fmt: skip
    one_line(error, "no domain of the mix has a second document", "in several files")
    with pytest.raises(DataError) as error:
        prepare(replace(config, out=str(tmp_path / "math"), mix=MixConfig(0, 1, 0, 1),
                        input=[str(raw[0] / "code")]), map_shards=HERE)  # fmt: skip
    one_line(error, "prepare.mix.multilingual=0.5: no document of this domain")


def test_a_share_of_documents_is_arranged_for_infilling(raw, tmp_path):
    config = config_of(raw[0], tmp_path / "set", fim_rate=0.5, mix=MixConfig(0, 1, 0, 0))
    config = replace(config, input=[str(raw[0] / "code"), str(raw[0] / "more.jsonl.gz")])
    told = prepare(config, map_shards=HERE)["domains"]["code"]
    texts = [text for part in ("train", "held_out") for text, _ in documents(config, part)]
    begin, hole, end = OWN
    arranged = [text for text in texts if begin in text]
    assert 0.2 < len(arranged) / len(texts) < 0.8 and told["infilled"] == len(arranged)
    for text in texts:
        if begin in text:
            prefix, rest = text.removeprefix(begin).split(hole)
            suffix, middle = rest.split(end)
            text = prefix + middle + suffix
        assert text in raw[1]


def test_datasets_opens_it_and_is_opened(prepared, tmp_path, raw):
    pattern = str(Path(prepared[0].out) / "train-*.arrow")
    opened = datasets.load_dataset("arrow", data_files=pattern, split="train", cache_dir=str(tmp_path))
    tokens = open_part(Path(prepared[0].out), "train")
    assert [i for row in opened["input_ids"] for i in row] == tokens[:].tolist() and len(opened) == sum(
        domain["documents"] for domain in prepared[1]["domains"].values()
    )
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "data.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in raw[1][:20]))
    config = config_of(raw[0], tmp_path / "set", mix=MixConfig(0, 1, 0, 0), text_field="content")
    report = prepare(replace(config, input=[f"dataset:{tmp_path}/hub"]), map_shards=HERE)
    assert report["documents"]["read"] == 20 and {text for text, _ in documents(config, "train")} <= {*raw[1][:20]}
    with pytest.raises(DataError, match="datasets cannot open it"):
        prepare(replace(config, out=f"{config.out}2", input=[f"dataset:{tmp_path}/none"]), map_shards=HERE)


def test_training_input_may_be_packed(raw):
    plain = read_documents([str(raw[0] / "more.jsonl.gz"), str(raw[0] / "math.jsonl.zst")])
    assert {*plain["text"]} <= {*raw[1]} and len(plain) == 36


def test_a_run_takes_prepared_sets(prepared, raw, tmp_path):
    def run_of(**data):
        config = load_config("tiny")
        return replace(config, model=replace(config.model, vocab_size=600), data=replace(config.data, **data))

    config = run_of(path=[prepared[0].out])
    data = prepare_run(config, tmp_path / "run")
    assert is_prepared(config, tmp_path / "run") and not is_prepared(run_of(path=[prepared[0].out], seed=3), tmp_path / "run")
    assert data.train_tokens == prepared[1]["tokens"]["train"] and data.held_out_tokens == prepared[1]["tokens"]["held_out"]
    assert len(open_prepared(config, tmp_path / "run").train) == data.train_tokens
    prepare_run(run_of(path=[prepared[0].out], seed=3), tmp_path / "run")
    assert not is_prepared(config, tmp_path / "run")
    other = config_of(raw[0], tmp_path / "other", mix=MixConfig(0, 1, 0, 0))
    prepare(replace(other, input=[str(raw[0] / "code")]), map_shards=HERE)
    with pytest.raises(DataError) as error:
        prepare_run(run_of(path=[prepared[0].out, other.out]), tmp_path / "two")
    one_line(error, "another tokenizer", "prepare.tokenizer=")
    with pytest.raises(DataError, match=r"model\.vocab_size=320.*at least"):
        prepare_run(replace(config, model=replace(config.model, vocab_size=320)), tmp_path / "small")
    with pytest.raises(DataError, match=r"holds no prepared\.json"):
        prepare_run(run_of(path=[str(tmp_path)]), tmp_path / "none")
    with pytest.raises(ConfigError, match=r"data\.path.*not both"):
        from_mapping({"data": {"path": "a", "input": "b"}})


def test_command_line_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prepare", "--config", "data_sample", f"prepare.input={tmp_path}/none"])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/none: no such file or directory; check prepare.input\n"
