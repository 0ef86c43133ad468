"""Copies, quality and domains of planted and real texts; shards of tokens and the sequences read from them."""

import base64
import json
import random
import struct

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from deepseek_jax.config import load_config
from deepseek_jax.data.dedup import EXACT, WIDTH, find_originals, shingles, signatures
from deepseek_jax.data.division import plan_reading
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.domains import classify
from deepseek_jax.data.loader import Mixture, Windows, evaluation_sequences
from deepseek_jax.data.megatron import HEADER, MAGIC, read_megatron
from deepseek_jax.data.mixing import mix_documents
from deepseek_jax.data.quality import judge
from deepseek_jax.data.shards import Tokens, open_shard, write_shard
from deepseek_jax.data.sources import Document, Piece, read_source
from deepseek_jax.data.tokenizer import DEEPSEEK_WORDS, pieces, train_tokenizer
from parity_tests.texts import TEXT, one_line

CHINESE = (
    "机器学习是人工智能的一个分支，它使用统计方法让计算机系统能够利用数据逐步提高完成特定任务的能力，而不需要明确的程序指令。"
    "港口很安静，第一批渔船回来了。在海上漂泊了一周的男人们站在码头上，话很少；担心风暴的妻子们说得更少。只有孩子们在渔网之间跑来跑去，"
    "问今天捕到了什么鱼，大人叫他们小心绳子。傍晚时分，街上每一扇窗户都点起了灯，有人开始弹奏一首大家从小就熟悉的老歌。"
)
PROSE = (
    "The harbour was quiet when the first of the boats came home. Men who had been at sea for a week stood on the quay "
    "and said little, and their wives, who had feared the storm, said even less. Only the children ran about between the "
    "nets, asked what fish there was, and were told to mind the ropes. Later in the evening a lamp was lit in every "
    "window of the street, and somebody began to play an old song that everyone there had known since they were young."
)


@pytest.fixture(scope="module")
def library() -> dict[str, list[str]]:
    documents = [d for d in read_source(Piece("python:"), "text", "domain", None) if isinstance(d, Document)]
    topics = [d.text for d in documents if "topics/" in d.source and len(d.text) > 600]
    return {"general": topics, "code": [d.text for d in documents if "topics/" not in d.source and len(d.text) > 600]}


def near_copy(words: list[str], similarity: float, generator: random.Random) -> str:
    """With a stretch of other words in its place, so that Jaccard's similarity of the shingles is about that."""
    kept = 2 * similarity / (1 + similarity)
    count = round((len(words) - 4) * (1 - kept)) - 4  # each shingle is five words long
    start = generator.randrange(len(words) - count)
    return " ".join([*words[:start], *(f"w{generator.randrange(10**6)}" for _ in range(count)), *words[start + count :]])


def jaccard(one: str, other: str) -> float:
    first, second = {*shingles(one).tolist()}, {*shingles(other).tolist()}
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("threshold", [0.7, 0.8])
def test_near_copies_are_found_by_their_similarity(threshold):
    generator = random.Random(0)
    originals = [[f"v{generator.randrange(10**6)}" for _ in range(400)] for _ in range(120)]
    texts, found = [" ".join(words) for words in originals], {}
    planted = {s: [near_copy(words, s, generator) for words in originals] for s in (0.5, 0.7, 0.8, 0.9)}
    for similarity, copies in planted.items():
        assert abs(jaccard(copies[0], texts[0]) - similarity) < 0.02
        roots = find_originals(signatures([*texts, *copies]), 0, threshold)
        assert (roots[:120] == -1).all() and ({*roots[120:]} <= {-1, *range(120)})
        assert all(root in (-1, number) for number, root in enumerate(roots[120:]))
        found[similarity] = (roots[120:] >= 0).mean()
    # The estimate from 128 permutations has a standard deviation of 0.04 at 0.7.
    assert found[0.5] == 0 and found[0.9] > 0.98
    assert (found[0.7] < 0.05) if threshold == 0.8 else (found[0.8] > 0.97 and 0.2 < found[0.7] < 0.8)


def test_the_first_of_copies_stays_whatever_the_language():
    other = CHINESE[::-1]
    texts = [PROSE, CHINESE, f"  {PROSE}\n", "short", CHINESE + "。", "short", "!?", "!!", other, PROSE.upper()]
    roots = find_originals(signatures(texts), 0, 0.8)
    assert roots.tolist() == [-1, -1, 0, -1, 1, 3, -1, -1, -1, 0]
    assert find_originals(signatures(texts), 0, 1).tolist() == [-1, -1, 0, -1, -1, 3, -1, -1, -1, -1]
    assert find_originals(signatures([*texts[:4], *texts]), 4, 0.8)[4:].tolist() == [0, 1, 0, 3, 1, 3, -1, -1, -1, 0]


def test_what_was_there_earlier_counts_however_alike():
    """Of two earlier documents that are copies of each other now, the other's copy is one, too."""
    first, second, third = np.random.default_rng(0).integers(2**32, size=(3, WIDTH), dtype=np.uint32)
    second[EXACT : EXACT + 96] = first[EXACT : EXACT + 96]
    third[EXACT + 32 :] = second[EXACT + 32 :]  # agrees with the second in 96 of 128, with the first in 64
    known = np.stack([first, second, third])
    assert find_originals(known, 0, 0.7).tolist() == [-1, 0, -1]
    assert find_originals(known, 2, 0.7).tolist() == [-1, -1, 1]


GOOD = {"prose": (PROSE, "general"), "chinese": (CHINESE, "multilingual"), "code": (TEXT[: len(TEXT) // 2], "code")}
POOR = {
    "boilerplate": ("Accept all cookies\nSign up for our newsletter\nAll rights reserved\n" * 2 + PROSE[:120]
                    + "\nClick here\n" * 3
                    + " ".join(f"word{i} of it" for i in range(60)), "general", "boilerplate"),
    "gibberish": (" ".join("".join(random.Random(i).choices("bcdfghjklmnpqrstvwxzaeiou", k=6)) for i in range(300)), "general",
                  "gibberish"),
    "base64": (PROSE + base64.b64encode(random.Random(0).randbytes(3000)).decode(), "general", "blob"),
    "mojibake": (PROSE.replace("a", "é").encode().decode("latin-1"), "general", "mojibake"),
    "repetition": ((PROSE[:60] + "\n") * 30, "general", "repeated lines"),
    "short": ("Too little to say.", "general", "too short"),
    "symbols": (PROSE.replace(" ", " # "), "general", "symbols"),
    "minified": ("var a=1;" * 4000, "code", "long lines"),
    "huge line": ("x" * 50_000_000, "code", "long lines"),
    "huge line of prose": ((PROSE + " ") * 100_000, "general", "repeated phrases"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_text_passes(name):
    assert judge(*GOOD[name]).score >= 0.6


@pytest.mark.parametrize("name", POOR)
def test_poor_text_is_dropped_by_its_rule(name):
    text, domain, rule = POOR[name]
    judgement = judge(text, domain)
    assert 0 <= judgement.score < 0.6
    assert judgement.rule == rule


def test_real_text_passes_and_is_of_its_domain(library):
    for domain, texts in library.items():
        texts = texts[:60]
        assert sum(classify(text) == domain for text in texts) >= 0.95 * len(texts)
        assert sum(judge(text, domain).score >= 0.6 for text in texts) >= 0.9 * len(texts)


@pytest.mark.parametrize("text, domain", [
    (PROSE, "general"), (CHINESE, "multilingual"),
    ("Der Hafen war still, als das erste der Boote heimkam. Männer, die eine Woche lang auf See gewesen waren, standen da.",
     "multilingual"),
    ("Пристань была тиха, когда вернулась первая из лодок. Люди стояли на берегу и говорили мало.", "multilingual"),
    ("Theorem 2. Let $p$ be a prime and $a \\in \\mathbb{Z}$. Then $a^p \\equiv a \\pmod{p}$. Proof. The multiplicative "
     "group of the finite field has order $p - 1$.", "math"),
    ("#include <stdio.h>\nint main(void) {\n    printf(\"%d\\n\", 1);\n    return 0;\n}\n", "code"),
])  # fmt: skip
def test_domains_of_short_texts(text, domain):
    assert classify(text) == domain


def test_mix_is_as_asked_and_repetition_capped():
    generator = np.random.default_rng(0)
    domains, lengths = generator.choice(3, 5000, p=[0.7, 0.25, 0.05]), generator.integers(20, 2000, 5000)
    shares = {"a": 0.5, "b": 0.2, "c": 0.3}
    order, told = mix_documents(domains, lengths, "abc", shares, None, 4, seed=3)
    total = lengths[order].sum()
    for number, name in enumerate("abc"):
        tokens = lengths[order[domains[order] == number]].sum()
        assert tokens == told[name].tokens and abs(tokens / total - shares[name]) < 0.001
    assert told["c"].repetition == pytest.approx(4, abs=0.01) and max(t.repetition for t in told.values()) <= 4
    assert (order == mix_documents(domains, lengths, "abc", shares, None, 4, seed=3)[0]).all()
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    small, told = mix_documents(domains, lengths, "abc", shares, 200_000, 4, seed=4)
    assert abs(lengths[small].sum() - 200_000) < 2000 and np.bincount(small).max() == 1
    with pytest.raises(DataError, match=r"prepare\.mix\.d=0\.5: no document"):
        mix_documents(domains, lengths, "abcd", {"a": 0.5, "d": 0.5}, None, 4, seed=0)


@pytest.fixture
def tokens(tmp_path) -> tuple[Tokens, np.ndarray]:
    """A row of tokens in five shards, and as an array."""
    row = np.arange(1000, dtype=np.uint16)
    edges = [0, 7, 300, 301, 640, 1000]
    paths = [tmp_path / f"{number}.arrow" for number in range(5)]
    for path, start, end in zip(paths, edges, edges[1:]):
        write_shard(path, np.array_split(row[start:end], 3), ["a", "b", "c"], ["x"] * 3, row.dtype)
    return Tokens(paths, np.diff(edges).tolist()), row


def test_shards_are_one_row_of_tokens(tokens, tmp_path):
    tokens, row = tokens
    assert len(tokens) == 1000 and (tokens[:] == row).all() and len(tokens[5:5]) == 0
    for start, end in ((0, 1), (6, 8), (290, 310), (300, 301), (0, 1000), (900, 2000)):
        assert (tokens[start:end] == row[start:end]).all()
    of_array, of_shards = (Windows(tokens, 13, 10, seed=3) for tokens in (row, tokens))
    assert (of_array.take(5, 300) == of_shards.take(5, 300)).all()
    shard = open_shard(tmp_path / "1.arrow")
    assert len(shard) == 3 and shard.tokens.dtype == np.uint16 and (shard.document(1) == row[105:203]).all()
    assert not shard.tokens.flags.owndata
    broken = tmp_path / "broken.arrow"
    for content in (b"", b"no", (tmp_path / "1.arrow").read_bytes()[:-300]):
        broken.write_bytes(content)
        with pytest.raises(DataError) as error:
            open_shard(broken)
        one_line(error, "broken.arrow: cannot be read as a shard")
    with pytest.raises(DataError, match="holds 339 tokens, not what"):
        Tokens([tmp_path / "3.arrow"], [340])[0:1]


def test_sets_are_mixed_by_weight_for_any_number_of_hosts(tokens):
    own = [Windows(np.arange(start, start + 5000), 6, 5, seed=1) for start in (0, 10_000, 20_000)]
    stream = Mixture(own, [5, 3, 2.004], seed=2)
    whole = stream.take(0, 2000)
    assert len(stream) == sum(map(len, own))
    owners = whole[:, 0] // 10_000
    for block in (owners[:1000], owners[1000:]):
        assert np.bincount(block).tolist() == [500, 300, 200]
    assert abs(np.corrcoef(owners[1:], owners[:-1])[0, 1]) < 0.1
    for number, part in enumerate(own):
        assert sorted(whole[owners == number][:, 0]) == sorted(part.take(0, (owners == number).sum())[:, 0])
    for hosts in (1, 2, 4):  # each host reads its rows of each batch
        batches = [np.concatenate([stream.take(first + host * 8 // hosts, 8 // hosts) for host in range(hosts)])
                   for first in range(0, 400, 8)]  # fmt: skip
        assert (np.concatenate(batches) == whole[:400]).all()
    assert (stream.take(777, 500) == whole[777:1277]).all()  # resumed by one number


def test_of_several_sets_all_are_evaluated_as_much_as_they_are_read():
    config = load_config("tiny", ["train.sequence_length=5", "train.eval_sequences=20"])
    rows = np.arange(1000), np.arange(1000, 1300)
    own, other = np.sort(evaluation_sequences(config, rows, [3, 1]).take(0, 20)[:, 0]).reshape(4, 5)[[0, 3]]
    assert own.tolist() == [0, 5, 10, 15, 20] and other.tolist() == [1000, 1005, 1010, 1015, 1020]
    assert (evaluation_sequences(config, rows[:1], [1]).take(0, 20)[:, 0] == np.arange(0, 100, 5)).all()


def test_a_large_file_is_divided_between_lines_or_row_groups(tmp_path):
    generator = random.Random(0)
    lines = [json.dumps({"text": f"{i} {'x' * generator.randrange(400)}"}) for i in range(300)]
    lines[7], lines[205], lines[299] = "{broken", "", json.dumps({"text": "y" * 5000})
    rows = {"text": [None if i == 250 else f"{i}" for i in range(300)]}
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    parquet.write_table(pa.table(rows), tmp_path / "long.parquet", row_group_size=40)
    for name, size in (("long.jsonl", 1000), ("long.jsonl", 7), ("long.parquet", 200)):
        path = str(tmp_path / name)
        pieces_of = [piece for group in plan_reading([path], size) for piece in group]
        found = [item for piece in pieces_of for item in read_source(piece, "text", "domain", None)]
        assert len(pieces_of) >= 5 and found == list(read_source(Piece(path), "text", "domain", None))
        assert len(found) == (299 if "jsonl" in name else 300)
    assert len(plan_reading([str(tmp_path)], 10**6)) == 1 and len(plan_reading([str(tmp_path)], 20_000)) > 2
    (tmp_path / "long.parquet").write_bytes(b"PAR1")
    (piece,) = (piece for group in plan_reading([str(tmp_path / "long.parquet")], 9) for piece in group)
    assert [fault.reason for fault in read_source(piece, "text", "domain", None)] == ["not sound parquet"]


def test_megatron_is_read_and_checked(tmp_path, tokenizer):
    texts = ["one text", "another,\nof two parts"]
    ids = [np.array(tokenizer.encode(text).ids, "<u2") for text in (texts[0], texts[1][:9], texts[1][9:])]
    lengths = [len(part) for part in ids]
    offsets = np.cumsum([0, *(2 * length for length in lengths)])[:-1]
    index, tokenizer_file = tmp_path / "set.idx", tmp_path / "tokenizer.json"
    content = HEADER.pack(MAGIC, 1, 8, 3, 3) + struct.pack("<3i3q3q", *lengths, *offsets, 0, 1, 3)
    index.with_suffix(".bin").write_bytes(b"".join(part.tobytes() for part in ids))
    index.write_bytes(content)
    tokenizer.save(str(tokenizer_file))
    read = read_source(Piece(str(index)), "text", "domain", str(tokenizer_file))
    assert [d.text for d in read if isinstance(d, Document)] == texts
    with pytest.raises(DataError, match=r"prepare\.tokenizer=PATH"):
        list(read_source(Piece(str(index)), "text", "domain", None))
    for wrong in (
        content[:-1],
        b"x" + content[1:],
        content[:10],
        content.replace(struct.pack("<q", 0), struct.pack("<q", 10**9), 1),
    ):
        index.write_bytes(wrong)
        with pytest.raises(DataError, match=r"set\.idx"):
            list(read_megatron(index))


def test_deepseek_rules_keep_numbers_and_scripts_apart():
    text = TEXT + CHINESE + "日本語のテキスト 12345 ab\n"
    tokenizer = train_tokenizer([text] * 3, 500, DEEPSEEK_WORDS)
    split = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("x12345 語a")]
    assert split[:3] == ["x", "123", "45"] and len(split) == 6
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    long = text * 40
    assert [i for piece in pieces(long) for i in tokenizer.encode(piece).ids] == tokenizer.encode(long).ids
