"""Models and trainers from Python: sizes, words, tokenizers, texts, and the same names in both siblings."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import deepseek_jax
import deepseek_torch
from deepseek_jax import api
from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.config.sizes import model_from
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.texts import as_prompts, as_tokenizer, continued
from deepseek_jax.errors import UserError
from deepseek_jax.training.fitting import plan_run
from deepseek_jax.training.loop import Interrupted
from parity_tests.checkpoints import TINY, write_huggingface_directory
from parity_tests.compiling import QUICKLY
from parity_tests.test_chat import MESSAGES, directory  # noqa: F401  (a fixture)

TEXTS = [f"The answer to question {n} is {n * n}.\n" for n in range(400)]
SIZES = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, n_routed_experts=4, moe_intermediate_size=16)


@pytest.mark.parametrize("imports, absent", [
    ("deepseek_jax, deepseek_jax.config, deepseek_jax.config.sizes, deepseek_jax.data.texts", "jax torch transformers"),
    ("deepseek_torch", "jax torch"),
    ("deepseek_torch.api", "jax"),
    ("deepseek_jax.api", "torch transformers"),
])  # fmt: skip
def test_importing_is_light(imports, absent):
    code = f"import {imports}, sys; print([name for name in {absent.split()} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_names_of_the_package():
    assert deepseek_jax.DeepSeekModel is api.DeepSeekModel and deepseek_torch.DeepSeekTrainer is not api.DeepSeekTrainer
    with pytest.raises(AttributeError, match="has no attribute 'DeepSeek'"):
        deepseek_jax.DeepSeek  # noqa: B018


def test_sizes_that_are_not_given_follow_from_those_that_are():
    sizes = dict(hidden_size=1024, num_attention_heads=16, num_hidden_layers=12, kv_lora_rank=256, n_routed_experts=32,
                 n_shared_experts=4, num_experts_per_tok=4)  # fmt: skip
    model = model_from(None, sizes)
    assert all(getattr(model, name) == value for name, value in sizes.items())
    assert (model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim) == (64, 32, 64)
    assert model.intermediate_size == 8 * model.moe_intermediate_size and model.n_group == 1
    v3 = ModelConfig()
    ours = model_from(None, dict(hidden_size=7168, num_attention_heads=56, num_experts_per_tok=8))
    for name in ("intermediate_size", "moe_intermediate_size", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert getattr(ours, name) == getattr(v3, name), name
    assert model_from("tiny", {"num_hidden_layers": 2}).hidden_size == 48
    for smallest in (dict(hidden_size=1), dict(num_hidden_layers=1), dict(num_attention_heads=1), {}):
        assert model_from(None, smallest)


@pytest.mark.parametrize(("word", "here"), [
    ("d_model", "hidden_size"), ("n_heads", "num_attention_heads"), ("num_layers", "num_hidden_layers"),
    ("d_ff", "intermediate_size .* moe_intermediate_size"), ("d_latent", "kv_lora_rank"),
    ("num_routed_experts", "n_routed_experts"), ("num_shared_experts", "n_shared_experts"),
    ("num_activated_experts", "num_experts_per_tok"), ("use_fp8", "precision=fp8"), ("hidden_sise", "hidden_size?"),
])  # fmt: skip
def test_other_words_are_answered_by_ours(word, here):
    for package in (deepseek_jax, deepseek_torch):
        with pytest.raises(ConfigError, match=f"^DeepSeekModel: unknown field model.{word}; .*{here}") as error:
            package.DeepSeekModel(**{word: 8})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("sizes", "complaint"), [
    (dict(hidden_size="1024"), None),  # text that is a number is one, as on the command line
    (dict(hidden_size=0), "model.hidden_size=0: must be at least 1"),
    (dict(num_attention_heads=1.5), "model.num_attention_heads is 1.5; it must be a whole number"),
    (dict(num_experts_per_tok=32), "model.num_experts_per_tok=32: must be at most 16"),
])  # fmt: skip
def test_sizes_that_cannot_work(sizes, complaint):
    if complaint is None:
        assert model_from(None, sizes).hidden_size == 1024
        return
    with pytest.raises(ConfigError, match=complaint):
        model_from(None, sizes)


def auto_tokenizer() -> PreTrainedTokenizerFast:
    """As AutoTokenizer returns them: of words, 300 of them, whose end of text has a name that nobody knows."""
    words = {
        word: number
        for number, word in enumerate(["[UNK]", "[STOP]", "The", "answer", "to", "question", "is", ".", *map(str, range(292))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[STOP]", unk_token="[UNK]")


def test_the_torch_sibling_trains_with_a_tokenizer_of_transformers_and_jax_writes_the_same(tmp_path):
    tokenizer = auto_tokenizer()
    model = deepseek_torch.DeepSeekModel(**SIZES, seed=3)
    trainer = deepseek_torch.DeepSeekTrainer(model, tokenizer=tokenizer, learning_rate=1e-2, warmup_steps=1, eval_sequences=4)
    history = trainer.train(TEXTS, epochs=0.5, batch_size=8, max_length=32, save_path=tmp_path / "run")
    assert model.config.vocab_size == 384 and model.tokenizer.token_to_id("<|endoftext|>") == 300 == len(tokenizer)
    assert history.loss[-1] < history.loss[0] and history.bits_per_byte and history._repr_png_().startswith(b"\x89PNG")
    assert len(history.loss) == len(history.steps) and "bits per byte" in repr(history)

    ids = tokenizer("The answer to").input_ids
    written = model.generate(ids, max_new_tokens=5, temperature=0)
    assert written[:3] == ids and model.generate(torch.tensor([ids, ids]), max_new_tokens=5, temperature=0) == [written] * 2
    assert tokenizer.decode(written).startswith("The answer to")
    model.save_pretrained(tmp_path / "hf")
    for package, path in ((deepseek_jax, "hf"), (deepseek_torch, "hf"), (deepseek_torch, "run")):
        same = package.DeepSeekModel.from_pretrained(tmp_path / path)
        assert same.generate(ids, max_new_tokens=5, temperature=0) == written

    again = deepseek_torch.DeepSeekTrainer(model, precision="bfloat16", eval_sequences=4)
    further = again.train(TEXTS[:100], batch_size=8, max_length=32, save_path=tmp_path / "further")
    assert further.loss[0] < 4.5 and model.config.precision == "bfloat16" == model.module.config.precision
    with pytest.raises(ConfigError, match=r"save_path=.*further: holds a run already; give another"):
        again.train(TEXTS, save_path=tmp_path / "further")


def test_adapters_learn_of_conversations_in_both_siblings(directory, tmp_path):  # noqa: F811
    """With what came with the weights: the chat template, and the tokens that end a text."""
    sizes = dataclasses.replace(TINY, num_hidden_layers=2, vocab_size=384, remat="none")
    base = write_huggingface_directory(tmp_path / "base", sizes, tokenizer=directory)
    shutil.copyfile(directory / "tokenizer_config.json", base / "tokenizer_config.json")
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    dialogues = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n} is it"}], "id": n}
                 for n in range(40)]  # fmt: skip
    for package in (deepseek_jax, deepseek_torch):
        out = tmp_path / package.__name__
        model = package.DeepSeekModel.from_pretrained(base)
        trainer = package.DeepSeekTrainer(model, learning_rate=1e-2, lora={"rank": 2}, bias_update_speed=0, eval_sequences=2)
        trainer.train(dialogues, batch_size=8, max_length=64, save_path=out / "run")
        ids = model.apply_chat_template([{"role": "user", "content": "7?"}])
        written = model.generate(ids, max_new_tokens=6, temperature=0)
        model.save_pretrained(out / "hf")
        again = package.DeepSeekModel.from_pretrained(out / "hf")
        assert again.apply_chat_template([{"role": "user", "content": "7?"}]) == ids
        assert again.generate(ids, max_new_tokens=6, temperature=0) == written
        names = ("generation_config.json", "tokenizer_config.json")
        assert [(out / "hf" / name).read_text() == (base / name).read_text() for name in names] == [True, True]
        was, came = (load_file(folder / "model.safetensors") for folder in (base, out / "hf"))
        changed = {name.split(".", 3)[3] for name in was if not np.array_equal(was[name], came[name])}
        attention = "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"
        assert changed == {f"self_attn.{name}.weight" for name in attention}
    trainer = package.DeepSeekTrainer(model, lora={"rank": 2, "modules": ["q_proj"]})
    with pytest.raises(ConfigError, match=r"^lora\.modules=q_proj: no Linear"):
        trainer.train(dialogues, max_length=64, save_path=out / "again")


@pytest.mark.slow
def test_the_cells_run_from_top_to_bottom(tmp_path):
    script = Path(__file__).parent.parent / "scripts" / "quickstart_cells.py"
    environment = os.environ | {
        "XLA_FLAGS": QUICKLY,
        "QUICK": "1",
        "PYTHONPATH": str(script.parent.parent),
    }
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ParameterCount(" in done.stdout and "bits per byte" in done.stdout and "\ndef " in done.stdout
    assert {path.name for path in (tmp_path / "runs/python").iterdir()} >= {"loss.png", "huggingface", "checkpoints"}


def test_a_run_that_is_interrupted_leaves_the_model_as_saved(tmp_path, monkeypatch):
    model, saved = api.DeepSeekModel("tiny"), {"params": {}, "router_state": {}}
    model._variables = {}

    def interrupted(config, variables):
        raise Interrupted("interrupted; step 3 is saved")

    monkeypatch.setattr(api, "train", interrupted)
    monkeypatch.setattr(api, "load_run", lambda run_dir: (model.config, None, saved))
    with pytest.raises(Interrupted):
        api.DeepSeekTrainer(model).train(TEXTS, batch_size=8, max_length=32, save_path=tmp_path / "run")
    assert model.variables is saved and model.tokenizer.get_vocab_size() <= model.config.vocab_size


def test_a_run_is_planned_from_texts(tmp_path):
    """An epoch is every sequence once, whatever is held out; the fields of training are passed on."""
    asked = {"train": {"batch_size": 4, "sequence_length": 16, "beta1": 0.8}, "data": {}}
    config = plan_run(model_from("tiny", {}), asked, iter(TEXTS), None, 2, tmp_path / "run", False)
    tokens = len(np.load(tmp_path / "run/data/train.npy"))
    assert config.train.steps == round(2 * ((tokens - 18) // 16 + 1) / 4) and config.train.beta1 == 0.8
    assert config.train.warmup_steps == config.train.steps // 20 and config.run_dir == str(tmp_path / "run")
    lines = (tmp_path / "run/given/texts.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == TEXTS


@pytest.mark.parametrize(("changes", "complaint"), [
    (dict(texts="one text"), "train_texts: a list of texts is expected and not one text; write .text."),
    (dict(texts=["a", {"text": "b"}]), "train_texts: number 1 is of type dict; text is expected"),
    (dict(texts=[]), "train_texts: there is no text in them"),
    (dict(texts=["little"]), "tokens found to train on|too few to hold a part out"),
    (dict(texts=["a", 1]), "train_texts: number 1 is of type int; text is expected"),
    (dict(texts=[MESSAGES]), r"number 0 is of type list; text or {\"messages\": \[...\]} is expected"),
    (dict(texts=[{"messages": MESSAGES}, "a"]), r"number 1 is of type str; {\"messages\": \[...\]} is expected"),
    (dict(texts=[{"messages": [{"role": "user", "content": b""}]}]), "number 0: Object of type bytes is not JSON"),
    (dict(texts=[{"messages": MESSAGES}] * 4), "conversations need a tokenizer with a chat template; give tokenizer="),
    (dict(texts=[{"messages": MESSAGES}] * 4, tokenizer=auto_tokenizer()), "given: no chat template, neither chat_template"),
    (dict(train=dict(batch_size=4, sequence_length=4096)), "max_length=4096: the model's max_position_embeddings is 128"),
    (dict(train=dict(batch_size=4, sequence_length=16, learning_rat=1)), "^DeepSeekTrainer: unknown field train.learning_rat"),
    (dict(tokenizer=len), "tokenizer of type builtin_function_or_method: give the path of a tokenizer.json, or a fast"),
    (dict(tokenizer="absent.json"), "absent.json: the tokenizer cannot be read: No such file"),
    (dict(tokenizer=auto_tokenizer(), model=model_from("tiny", {"vocab_size": 290})), "set model.vocab_size to at least 301"),
])  # fmt: skip
def test_what_cannot_be_trained_on_is_one_line(tmp_path, changes, complaint):
    usual = dict(model=model_from("tiny", {}), train=dict(batch_size=4, sequence_length=16), texts=TEXTS, tokenizer=None)
    given = usual | changes
    given["asked"] = {"train": given.pop("train"), "data": {}}
    with pytest.raises(UserError, match=complaint) as error:
        plan_run(**given, epochs=1, save_path=tmp_path / "run", fits_vocabulary=False)
    assert "\n" not in str(error.value)
    assert "train" not in changes or not (tmp_path / "run").exists()


@pytest.mark.parametrize(("field", "word"), [("batch_size", "batch_size"), ("sequence_length", "max_length")])
def test_a_trainer_is_not_made_with_what_train_would_replace(field, word):
    for package in (deepseek_jax, deepseek_torch):
        with pytest.raises(ConfigError, match=f"^DeepSeekTrainer: {field} is said to its train\\(\\), as {word}=$"):
            package.DeepSeekTrainer(package.DeepSeekModel("tiny"), **{field: 8})


def test_a_tokenizer_stays_as_it_is():
    tokenizer = auto_tokenizer()
    assert as_tokenizer(tokenizer).get_vocab_size() == 301 and len(tokenizer) == 300
    assert as_tokenizer(as_tokenizer(tokenizer)).get_vocab_size() == 301


@pytest.mark.parametrize(("ids", "expected"), [
    ([1, 2], ([[1, 2]], False)),
    ((1, 2), ([[1, 2]], False)),
    ([[1, 2], [3]], ([[1, 2], [3]], True)),
    (np.array([[1, 2]]), ([[1, 2]], True)),
    (torch.tensor([1, 2]), ([[1, 2]], False)),
    ([torch.tensor([1, 2]), np.array([3])], ([[1, 2], [3]], True)),
])  # fmt: skip
def test_prompts(ids, expected):
    assert as_prompts(ids, 4) == expected


@pytest.mark.parametrize("ids", ["text", {"input_ids": [1]}, [], [[]], [4], [-1], [1.5], [[1], 2], None, 7, np.array(3)])
def test_what_is_no_prompt_is_one_line(ids):
    with pytest.raises(DataError, match=r"^ids") as error:
        as_prompts(ids, 4)
    assert "\n" not in str(error.value)


def test_a_sequence_ends_with_its_first_end():
    assert continued([[1], [2, 3]], [[5, 0], [6, 0], [0, 0]], 0) == [[1, 5, 6, 0], [2, 3, 0]]
    assert continued([[1]], [[0], [5]], None) == [[1, 0, 5]]


@pytest.mark.parametrize(("settings", "complaint"), [
    (dict(temperature=-1), "temperature=-1: must be at least 0"),
    (dict(top_p=0), "top_p=0: must be in"),
    (dict(max_new_tokens=0), "max_new_tokens=0: must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_sampled_by_is_one_line(settings, complaint):
    for package in (deepseek_jax, deepseek_torch):
        with pytest.raises(UserError, match=complaint):
            package.DeepSeekModel("tiny").generate([1], **settings)
