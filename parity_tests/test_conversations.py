"""Conversations as training reads them: whose words count, what a row holds, and what is refused."""

import dataclasses
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import deepseek_torch.train as in_torch
from deepseek_jax import evaluate
from deepseek_jax.checkpoint.tokenizer_files import CHAT_TEMPLATE
from deepseek_jax.config import HELD_OUT, ConfigError, load_config
from deepseek_jax.config.trainable import with_part
from deepseek_jax.data.conversations import laid, read_conversations, template_of
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.loader import training_sequences
from deepseek_jax.data.marks import COUNTED, ENDS, IDS
from deepseek_jax.data.packing import prepare
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.generation.chat import load_chat_template
from deepseek_jax.train import read_config, train
from deepseek_jax.training.initial import initial_variables
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.step import Scalars, init_state, train_step
from deepseek_torch.training.loss import training_loss
from deepseek_torch.training.schedules import plan_steps
from deepseek_torch.training.step import init_state as init_torch_state
from deepseek_torch.training.step import train_step as torch_train_step
from parity_tests.checkpoints import TINY, write_huggingface_directory
from parity_tests.comparison import assert_close
from parity_tests.modules import COMPILE_QUICKLY
from parity_tests.siblings import Siblings
from parity_tests.test_adapters import adapters_of, adapters_to_torch, conversations
from parity_tests.test_chat import MESSAGES, directory  # noqa: F401  (a fixture)
from parity_tests.texts import TEXT, one_line
from parity_tests.weights import to_torch

CONVERSATIONS = [
    MESSAGES[:3],
    [{"role": "user", "content": "naïve 東京?"}, {"role": "assistant", "content": "  ü 12 \n\n yes "}] * 2,
    [{"role": "user", "content": "a<|endoftext|>b"}, {"role": "assistant", "content": "<|system|> is text"}],
]


def parts_of(template, messages) -> list[str]:
    """What counts of a conversation, decoded, run by run."""
    ids, counted = template.answers(messages)
    tokenizer, runs = template._tokenizer, [[]]
    for token, counts in zip(ids, counted):
        if counts:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def test_what_counts_is_what_transformers_says(directory):  # noqa: F811
    ours = load_chat_template(directory, load_tokenizer(directory))
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    for messages in CONVERSATIONS[:2]:  # special tokens' names in messages are tokens there
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, counted = ours.answers(messages)
        assert ids == expected["input_ids"] == ours.tokens(messages, add_generation_prompt=False)
        assert [int(counts) for counts in counted] == expected["assistant_masks"]
    assert parts_of(ours, CONVERSATIONS[1]) == ["ü 12 \n\n yes<|endoftext|>"] * 2
    assert parts_of(ours, CONVERSATIONS[2]) == ["<|system|> is text<|endoftext|>"]
    with pytest.raises(UserError, match=r"a message contains U\+200C"):
        ours.answers([{"role": "user", "content": "\u200c\uf8fd\u200c"}])


def test_without_marks_it_is_what_a_message_adds_to_its_prompt(directory, tmp_path):  # noqa: F811
    marked = load_chat_template(directory, load_tokenizer(directory))
    (tmp_path / "plain").write_text(marked.source.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    plain = load_chat_template(directory, load_tokenizer(directory), tmp_path / "plain")
    for messages in CONVERSATIONS:
        assert plain.answers(messages) == marked.answers(messages)
    changing = "{% for m in messages %}{{ m.role }}: {% if loop.last %}[thought]{% endif %}{{ m.content }}\n{% endfor %}"
    (tmp_path / "changing").write_text(changing + "{% if add_generation_prompt %}assistant: {% endif %}")
    template = load_chat_template(directory, load_tokenizer(directory), tmp_path / "changing")
    with pytest.raises(UserError, match=r"changing: .*writes message 2 otherwise.*mark the assistant's words") as caught:
        template.answers(CONVERSATIONS[1])
    one_line(caught)


@pytest.fixture(scope="module")
def chat_files(directory, tmp_path_factory):  # noqa: F811
    """Conversations of many lengths from real text, a model that can read them, and words for both programs."""
    folder = tmp_path_factory.mktemp("conversations")
    words, lines, rng = TEXT.split(), [], np.random.default_rng(0)
    for number in range(60):
        messages = []
        for _ in range(1 + number % 3):
            at = rng.integers(0, len(words) - 12)
            count = int(rng.integers(1, 9))
            messages.append({"role": "user", "content": f"Say {count}: {words[at]}"})
            messages.append({"role": "assistant", "content": " ".join(words[at : at + count])})
        lines.append(json.dumps({"messages": messages, "id": number}))
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n\n")
    model = dataclasses.replace(TINY, num_hidden_layers=2, vocab_size=384)
    base = write_huggingface_directory(folder / "base", model, tokenizer=directory)
    (base / "tokenizer_config.json").write_text((directory / "tokenizer_config.json").read_text())
    return base, folder / "chat.jsonl", [
        f"init_from={base}", "data.format=chat", f"data.input={folder / 'chat.jsonl'}", "train.sequence_length=64",
        "train.batch_size=4", "train.warmup_steps=0", "train.steps=3", "train.eval_sequences=2", "data.held_out_fraction=0.1",
        "train.gradient_accumulation_steps=2", "lora.rank=2", "train.trainable=['lm_head/*']", "train.learning_rate=1e-2",
        "model.remat=none", "model.grouped_matmul=reference",
    ]  # fmt: skip


def test_evaluate_counts_the_assistants_words_alone(chat_files, tmp_path, monkeypatch, capsys):
    """As transformers' model and mask have it."""
    base, file, _ = chat_files
    few = tmp_path / "few.jsonl"
    few.write_text("".join(file.read_text().splitlines(keepends=True)[:12:3]))  # of one turn: within the context
    monkeypatch.setattr(sys, "argv", ["evaluate", str(base), "--chat", str(few)])
    evaluate.main()
    line = capsys.readouterr().out.splitlines()[1].split()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", experts_implementation="eager").eval()
    nats, counts = 0.0, 0
    for text in few.read_text().splitlines():
        said = tokenizer.apply_chat_template(json.loads(text)["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = torch.tensor([said["input_ids"]]), torch.tensor(said["assistant_masks"][1:], dtype=torch.bool)
        with torch.no_grad():
            told = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0].double(), ids[0, 1:], reduction="none")
        nats, counts = nats + told[mask].sum().item(), counts + int(mask.sum())
    assert line[1:3] == ["4", f"{counts:,}"]
    assert abs(float(line[5]) / np.exp(nats / counts) - 1) < 1e-5


def test_rows_hold_every_conversation_once(chat_files, tmp_path):
    base, path, words = chat_files
    config = read_config(None, False, words)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(base / "tokenizer.json")))
    data = prepare(config, tmp_path / "run")
    template, window = template_of(config), 64 + 1 + 1
    rows = [np.asarray(part).reshape(-1, window) for part in (*data.sets, *data.held_out)]
    found, filling = [], 0
    for row in np.concatenate(rows):
        pieces = np.split(row, np.flatnonzero(row & ENDS) + 1)
        within = [piece for piece in pieces if len(piece) and (piece & COUNTED).any()]
        assert sum(map(len, within)) <= 65 and all((row[sum(map(len, within)) :] & COUNTED) == 0)
        found += [tuple(piece & ~np.uint32(ENDS)) for piece in within]
        filling += window - sum(map(len, within))
    expected, cut = [], 0
    for _, messages in read_conversations([path]):
        ids, counted = template.answers(messages)
        cut += len(ids) > 65
        expected.append(tuple((np.array(ids, np.uint32) | np.where(counted, np.uint32(COUNTED), np.uint32(0)))[:65]))
    assert sorted(found) == sorted(expected) and cut > 0
    assert data.conversations.cut == cut and data.conversations.dropped == 0 and data.conversations.conversations == 54
    assert data.conversations.counted == sum(int(np.count_nonzero(r & COUNTED)) for r in rows[0])
    assert filling < 0.2 * sum(row.size for row in rows), "of a row of real text"
    first = next(iter(training_sequences(config, data.sets).take(0, 1)))
    assert first.shape == (window,) and any((row == first).all() for row in rows[0])
    assert data.to_evaluate(config)[HELD_OUT].take(0, 1).shape == (1, 65)
    assert (tmp_path / "run" / CHAT_TEMPLATE).read_text() == template.source
    assert (rows[0] & IDS).max() < config.model.vocab_size


def test_the_longest_lie_first():
    lengths = [[len(piece) for piece in row] for row in laid([np.zeros(n) for n in (3, 9, 5, 1, 4, 10)], 10)]
    assert lengths == [[10], [9, 1], [5, 4], [3]]


def test_the_mean_does_not_hang_on_the_parts(directory):  # noqa: F811
    """However the counted tokens of a batch are spread over its accumulation parts, the sibling's gradients are the same."""
    config = load_config("tiny", ["data.format=chat", "model.precision=float64", "model.num_hidden_layers=2"])
    tokens = torch.from_numpy(conversations(config, 7, (4, 14))).long()
    tokens[:2] &= ~COUNTED
    tokens[0, 5] |= COUNTED
    found = []
    for shape in ((1, 4, 14), (2, 2, 14)):
        pair = Siblings(config.model)
        state = init_torch_state(config, pair.torch)
        plan = next(plan_steps(config.train))
        metrics = torch_train_step(state, tokens.reshape(shape), dataclasses.replace(plan, learning_rate=0.0), config)
        found.append({"loss": metrics.loss, "norm": metrics.grad_norm, "parts": metrics.parts.cross_entropy})
    assert_close(*found, 1e-12)
    nothing, parts = training_loss(pair.torch, tokens & ~COUNTED, config, 0.3)
    assert torch.isfinite(nothing) and parts.cross_entropy.abs().max() == 0


@pytest.mark.slow
def test_twenty_steps_in_lockstep_from_an_export(chat_files, tmp_path):
    """init_from, adapters, some weights beside them and conversations: every number in float64, after every step."""
    base, _, words = chat_files
    config = read_config(None, False, [*words, "model.precision=float64", "train.steps=20"])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(base / "tokenizer.json")))
    windows = training_sequences(config, prepare(config, tmp_path).sets)
    model = in_torch.initial_model(config)
    in_sibling = init_torch_state(config, model)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), initial_variables(config))
        state = jax.jit(partial(init_state, config))(variables)
        state = state._replace(params=with_part(state.params, adapters_of(model.state_dict(), config)))
        step = jax.jit(partial(train_step, config=config), compiler_options=COMPILE_QUICKLY)
        losses = []
        for plan in plan_steps(config.train):
            tokens = windows.take(plan.first_sequence, plan.batch_size).reshape(2, 2, -1)
            scalars = Scalars(*map(jnp.float64, (plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight)))
            state, ours = step(state, tokens, scalars)
            theirs = torch_train_step(in_sibling, torch.from_numpy(tokens).long(), plan, config)
            told = [{"loss": m.loss, "norm": m.grad_norm, "parts": m.parts.cross_entropy} for m in (ours, theirs)]
            assert_close(*told, 1e-12 if plan.step == 1 else 1e-10)
            found = to_torch({"params": state.params, "router_state": state.router_state}, config.model)
            assert_close(found | adapters_to_torch(state.params, config), model.state_dict(), 1e-10)
            losses.append(float(ours.loss))
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5]), "something is to be learnt"


@pytest.mark.slow
def test_both_programs_read_the_same_conversations(chat_files, tmp_path, monkeypatch):
    _, path, words = chat_files
    words = [word for word in words if not word.startswith("lora")] + [f"data.eval.same={path}"]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    train(read_config(None, False, [*words, f"run_dir={tmp_path / 'jax'}"]))
    in_torch.train(in_torch.read_config(None, [*words, f"run_dir={tmp_path / 'torch'}"]))
    for mine, theirs in zip(*(read_metrics(tmp_path / name) for name in ("jax", "torch")), strict=True):
        for name in ("loss", "next_token_loss", "grad_norm", "bits_per_byte"):
            assert mine.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=2e-5), name


ANSWERED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BAD = [
    ("nothing", r"chat.jsonl:2: not JSON"),
    ({"text": "a"}, r"chat.jsonl:2: has no messages; "),
    ({"messages": []}, r"chat.jsonl:2: messages is \[\]; a list of messages"),
    ({"messages": [{"content": "a"}]}, r"chat.jsonl:2: .* is no message"),
    ({"messages": [{"role": "human", "content": "a"}]}, r"chat.jsonl:2: role human: give one of system"),
    ({"messages": [{"role": "user"}]}, r"chat.jsonl:2: user's content is None; text"),
    ({"messages": ANSWERED[:1]}, r"chat.jsonl:2: no message of the assistant's"),
    ({"messages": ANSWERED, "tools": [{}]}, r"chat.jsonl:2: has tools"),
    ({"messages": ANSWERED[::-1]}, r"chat.jsonl:2: .*the chat template refuses these messages: who begins\?"),
]


@pytest.mark.parametrize(("line", "told"), BAD)
def test_bad_conversations_are_named(line, told, directory, tmp_path):  # noqa: F811
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": ANSWERED}) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    config = load_config(
        "tiny", ["data.format=chat", f"data.input={path}", f"data.tokenizer={directory}", "model.vocab_size=384"]
    )
    with pytest.raises(DataError, match=told) as caught:
        prepare(config, tmp_path / "run")
    one_line(caught)
    assert not (tmp_path / "run").exists()


def test_what_chat_cannot_be_is_refused(directory, tokenizer, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=r"data.format=talk: choose one of text, chat"):
        load_config("tiny", ["data.format=talk"])
    with pytest.raises(ConfigError, match=r"data.chat_template=x: "):
        load_config("tiny", ["data.chat_template=x"])
    with pytest.raises(DataError, match=r"give a tokenizer with a chat template"):
        template_of(load_config("tiny", ["data.format=chat"]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = ["data.format=chat", f"data.tokenizer={tmp_path}"]
    with pytest.raises(UserError, match=r"no chat template, neither chat_template.jinja"):
        template_of(load_config("tiny", words))
    with pytest.raises(UserError, match=r"there: no such file; a chat template"):
        template_of(load_config("tiny", [*words, "data.chat_template=there"]))
    (tmp_path / "own").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    own = template_of(load_config("tiny", [*words, f"data.chat_template={tmp_path / 'own'}"]))
    assert own.render(ANSWERED) == "a<|endoftext|>b<|endoftext|>"


def test_parquet_has_every_field_in_every_message(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [ANSWERED, [*ANSWERED, {"role": "user", "content": "c", "name": "me"}]]
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "chat.parquet")
    found = list(read_conversations([tmp_path / "chat.parquet"]))
    assert [where.split(": ")[1] for where, _ in found] == ["row 1", "row 2"] and [messages for _, messages in found] == rows
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"text.parquet: has no column `messages` among text"):
        list(read_conversations([tmp_path / "text.parquet"]))
