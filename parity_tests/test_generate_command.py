"""`python -m deepseek_jax.generate`: text as it comes, and files of prompts."""

import dataclasses
import json
import shutil
import sys

import pytest

from deepseek_jax import generate as command
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.generation.chat import load_chat_template
from deepseek_jax.generation.continuation import Continuation, TextStream
from deepseek_jax.generation.generator import Generator
from deepseek_jax.training.loading import load_model
from deepseek_torch.generate import generate
from deepseek_torch.pretrained import load_pretrained
from parity_tests.checkpoints import TINY, write_huggingface_directory


def started(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, words)])
    command.main()


def fails(monkeypatch, capsys, *words):
    with pytest.raises(SystemExit) as exit:
        started(monkeypatch, *words)
    assert exit.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    """A Hugging Face directory with two end tokens and a chat template."""
    path = tmp_path_factory.mktemp("generate")
    tokenizer.save(str(path / "tokenizer.json"))
    write_huggingface_directory(path / "model", dataclasses.replace(TINY, num_hidden_layers=2), tokenizer=path)
    generation = json.loads((path / "model/generation_config.json").read_text())
    (path / "model/generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [0, 7]}))
    (path / "model/chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    return path / "model"


def test_a_file_of_prompts(directory, tmp_path, monkeypatch, capsys):
    """Batches of two, the last filled up: every line as the sibling writes it, in its place, with what it said."""
    lines = [
        {"prompt": "import sys and more than that", "id": "a"},
        {"prompt_ids": [5, 9, 2]},
        {"messages": [{"role": "user", "content": "class"}], "id": 3},
        {"prompt": "import sys and more than that"},
        {"prompt": "def"},
    ]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    started(monkeypatch, directory, "--input", source, "--output", output, "--temperature", 0, "--max-new-tokens", 9,
            "--batch-size", 2, "--log-probabilities")  # fmt: skip
    assert "5 prompts continued by" in capsys.readouterr().out
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{key: line[key] for key in given} for given, line in zip(lines, written)] == lines
    tokenizer, model = load_tokenizer(directory), load_pretrained(directory)
    texts = [lines[0]["prompt"], None, "class\n", lines[3]["prompt"], "def"]
    for line, text in zip(written, texts):
        prompt = [5, 9, 2] if text is None else tokenizer.encode(text).ids
        tokens = [step[0] for step in generate(model, [prompt], 9, None)]
        kept = next((place + 1 for place, token in enumerate(tokens) if token in (0, 7)), 9)
        assert line["tokens"] == tokens[:kept] and len(line["log_probabilities"]) == kept
        assert line["finish_reason"] == ("stop" if tokens[kept - 1] in (0, 7) else "length")
        assert line["text"] == tokenizer.decode([token for token in tokens[:kept] if token not in (0, 7)])
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.jsonl"}


@pytest.mark.parametrize(("line", "complaint"), [
    ("{", "prompts.jsonl:2: not JSON"),
    ("[1]", "prompts.jsonl:2: [1]; an object"),
    ('{"id": 1}', "prompts.jsonl:2: has no prompt"),
    ('{"prompt": "a", "messages": []}', "prompts.jsonl:2: has prompt and messages"),
    ('{"prompt": 3}', "prompts.jsonl:2: prompt is 3; text"),
    ('{"prompt_ids": [999]}', "prompts.jsonl:2: 999 is no token"),
    ('{"messages": [1]}', "prompts.jsonl:2: 1 is no message"),
    (json.dumps({"prompt": "ab " * 200}), "prompts.jsonl:2: the prompt has"),
])  # fmt: skip
def test_a_line_that_is_wrong_is_named(line, complaint, directory, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    words = ("--input", tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl")
    assert complaint in fails(monkeypatch, capsys, directory, *words)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("words", "complaint"), [
    (["--top-k", "-1"], "top_k=-1"), (["--min-p", "1"], "min_p=1.0"), (["--repetition-penalty", "0"], "repetition_penalty=0"),
    (["--input", "x"], "--input and --output"), (["--system", "x"], "--system"), (["--chat"], "--chat"),
    (["--prompt-ids", "5 x"], '"5 x"'), (["--prompt-ids", "5 320"], "320 is no token"), (["--step", "3"], "has no steps"),
])  # fmt: skip
def test_words_that_cannot_be_are_one_line(words, complaint, directory, monkeypatch, capsys):
    assert complaint in fails(monkeypatch, capsys, directory, *words)


def test_a_directory_without_a_model_is_one_line(tmp_path, monkeypatch, capsys):
    assert "no model here" in fails(monkeypatch, capsys, tmp_path)


def test_all_end_tokens_end_a_chat(directory, tmp_path, monkeypatch, capsys):
    """The last of several as well as the first: here whatever the model would say second."""
    assert load_model(directory).ends == (0, 7)
    words = ("--chat", "--prompt", "class", "--temperature", 0, "--max-new-tokens", 6, "--log-probabilities")
    told = "log-probabilities: "

    def written():
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(told))
        return len(line.removeprefix(told).split())

    started(monkeypatch, directory, *words)
    assert written() == 6
    model = load_model(directory)
    template = load_chat_template(directory, model.tokenizer)
    row = Continuation(template.tokens([{"role": "user", "content": "class"}]), 2)
    for _ in Generator(model.config, model.variables).run([row]):
        pass
    other = shutil.copytree(directory, tmp_path / "model")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [319, row.tokens[1]]}))
    started(monkeypatch, other, *words)
    assert written() == (1 if row.tokens[0] == row.tokens[1] else 2)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model"])
def test_tokens_where_a_tokenizer_is_not_read(name, directory, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(directory, tmp_path / "model")
    (other / "tokenizer.json").rename(other / name)
    started(monkeypatch, other, "--prompt-ids", "5 9 2", "--temperature", 0, "--max-new-tokens", 4)
    line = capsys.readouterr().out.strip()
    assert line.startswith("[5 9 2]") and len(line.removeprefix("[5 9 2]").split()) == 4
    assert "no tokenizer.json; give token ids" in fails(monkeypatch, capsys, other, "--prompt", "x")


def test_text_comes_whole_and_stops_before_a_stop_string(tokenizer):
    """Characters of several bytes in pieces; what may begin a stop string is held back until it is certain."""
    words = "für 日本 🙂 end\nSTOP more"
    tokens = tokenizer.encode(words).ids
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in tokens) + stream.rest() == words
    row = Continuation([1], 99, tokenizer=tokenizer, stop=["STOP", "\nST?"])
    told = ""
    for token in tokens:
        row.take(token)
        told += row.news()
        assert "S" not in told
    assert (told, row.text, row.finish) == ("für 日本 🙂 end\n", "für 日本 🙂 end\n", "stop")
    row = Continuation([1], len(tokens), tokenizer=tokenizer, stop=["more!"])
    assert "".join(row.take(token) or row.news() for token in tokens) == words and row.finish == "length"
