"""How likely text is, to the last digit: against transformers, and training's own evaluation against its definition."""

import dataclasses
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_jax import evaluate as command
from deepseek_jax.config import load_config
from deepseek_jax.data.packing import PreparedData
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.generation.scoring import Scorer
from deepseek_jax.parallel.mesh import resolve
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.training import evaluation
from deepseek_jax.training.evaluation import Evaluation
from deepseek_jax.training.step import TrainState, init_state
from deepseek_torch.training.evaluation import Evaluation as TorchEvaluation
from parity_tests.checkpoints import TINY, write_huggingface_directory
from parity_tests.siblings import Siblings
from parity_tests.transformers_oracle import Oracle, float64_islands

SMALL = dataclasses.replace(TINY, num_hidden_layers=2, num_nextn_predict_layers=0)
CONTEXT, STRIDE = 24, 10


@pytest.fixture(scope="module")
def pair():
    return Siblings(dataclasses.replace(SMALL, precision="float64"))


@pytest.fixture(scope="module")
def oracle(pair):
    """transformers' log-probabilities [T, V] after each of the tokens [T]."""
    with float64_islands():
        model = Oracle(pair.config, pair.torch.state_dict()).main.eval()

    def log_probabilities(tokens):
        with torch.no_grad(), float64_islands():
            return torch.log_softmax(model(torch.tensor([list(tokens)])).logits[0], -1).numpy()

    return log_probabilities


def test_every_target_counts_once_with_what_it_looks_back_on(pair, oracle, x64):
    """Texts within the context, off it and much longer; batches of three windows over all of them."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 320, length).tolist() for length in (1, 2, CONTEXT + 1, CONTEXT + 2, 71, 9)]
    scored = list(Scorer(pair.config, pair.variables, CONTEXT, STRIDE, 3).score(iter(sequences)))
    assert [len(one.nats) for one in scored] == [len(sequence) - 1 for sequence in sequences]
    for sequence, one in zip(sequences, scored):
        for target in range(1, len(sequence)):
            window = max(-(-(target - CONTEXT) // STRIDE), 0)
            last = min(CONTEXT + window * STRIDE, len(sequence) - 1)
            known = oracle(sequence[max(last - CONTEXT, 0) : target])[-1]
            assert abs(-known[sequence[target]] - one.nats[target - 1]) < 1e-12
            assert one.greedy[target - 1] == (known.argmax() == sequence[target])


def test_bits_per_byte_of_a_run_are_exactly_those_of_its_targets(pair, oracle, x64):
    """Five sequences in batches of two: the last batch's other sequence must not count, nor the
    shorter set's; no two tokens have the same bytes."""
    config = load_config("tiny", ["train.eval_sequences=5", "train.batch_size=2", "train.sequence_length=12"])
    config = dataclasses.replace(config, model=pair.config)
    tokens = np.random.default_rng(1).integers(0, 320, 100, dtype=np.int32)
    size = 1 + np.random.default_rng(2).permutation(320).astype(np.int32)
    texts = {"held_out": tokens, "short": tokens[55:70], "other": tokens[30:]}
    data = PreparedData(tokenizer=None, sets=(tokens,), held_out=(tokens,), end_of_document=0, token_bytes=size,
                        eval={name: texts[name] for name in ("short", "other")})  # fmt: skip
    expected = {}
    for name, text in texts.items():
        nats = nbytes = 0.0
        for start in range(0, min(60, len(text) - 12), 12):
            sequence = text[start : start + 13]
            nats -= oracle(sequence[:-1])[np.arange(12), sequence[1:]].sum()
            nbytes += size[sequence[1:]].sum()
        expected[name] = nats / math.log(2) / nbytes
    state = TrainState(pair.variables["params"], pair.variables["router_state"], None)
    for bits in (Evaluation(config, data).by_set(state), TorchEvaluation(config, data).by_set(pair.torch)):
        assert list(bits) == list(texts)
        assert all(abs(bits[name] / expected[name] - 1) < 1e-12 for name in texts)


def test_every_device_of_a_mesh_evaluates_its_own_sequences(monkeypatch):
    """Thirteen in batches of eight, of which the last is filled up; a sum of squares stands for the nats."""

    def squares(params, router_state, tokens, weights, config, division):
        return jnp.sum(jnp.sum(tokens**2, axis=1) * weights)

    monkeypatch.setattr(evaluation, "evaluation_nats", squares)
    config = load_config("tiny", ["train.eval_sequences=13", "train.batch_size=8", "train.sequence_length=12"])
    tokens = np.random.default_rng(0).integers(0, 320, 13 * 12 + 40)
    data = PreparedData(tokenizer=None, sets=(tokens,), held_out=(tokens,), end_of_document=0, token_bytes=np.ones(320, int))
    division = Division(resolve(config, 8), jax.eval_shape(partial(init_state, config)).params)
    expected = sum((tokens[start : start + 13] ** 2).sum() for start in range(0, 13 * 12, 12)) / math.log(2) / (13 * 12)
    for each in (None, division):
        (bits,) = Evaluation(config, data, each).by_set(TrainState({}, {}, None)).values()
        assert bits == pytest.approx(expected, rel=1e-6)


def from_pretrained(directory):
    """transformers' own model of an export."""
    plainest = dict(attn_implementation="eager", experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **plainest).eval()


def test_the_command_scores_an_export_as_transformers_does(tokenizer, tmp_path, monkeypatch, capsys):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    directory = write_huggingface_directory(tmp_path / "model", SMALL, tokenizer=tmp_path)
    (tmp_path / "one.txt").write_text("import numpy as np — that is all.\n" * 7)
    (tmp_path / "two.jsonl").write_text('{"text": "def f(x):"}\n{"text": "für"}\n')
    files = [str(tmp_path / name) for name in ("one.txt", "two.jsonl")]
    monkeypatch.setattr(sys, "argv", ["evaluate", str(directory), *files, "--context", "32"])
    command.main()
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    model, tokenizer = from_pretrained(directory), load_tokenizer(directory)
    expected = []
    for texts in ([(tmp_path / "one.txt").read_text()], ["def f(x):", "für"]):
        nats, count, size = 0.0, 0, sum(len(text.encode()) for text in texts)
        for text in texts:
            ids = [0, *tokenizer.encode(text).ids]
            for first in range(0, len(ids) - 1, 32):
                last = min(first + 32, len(ids) - 1)
                window = torch.tensor([ids[max(last - 32, 0) : last + 1]])
                with torch.no_grad():
                    logits = model(window[:, :-1]).logits
                by_token = torch.nn.functional.cross_entropy(logits[0].double(), window[0, 1:], reduction="none")
                nats += by_token[first - last :].sum().item()
                count += last - first
        expected.append((len(texts), count, size, nats))
    expected.append(tuple(map(sum, zip(*expected))))
    assert len(told) == 4
    for line, (documents, count, size, nats) in zip(told[1:], expected):
        assert line[1:4] == [f"{documents:,}", f"{count:,}", f"{size:,}"]
        assert abs(float(line[4]) - nats / math.log(2) / size) <= 6e-5
        assert abs(float(line[5]) / math.exp(nats / count) - 1) < 1e-6


@pytest.mark.parametrize(("words", "complaint"), [
    (["README.md", "--context", "500"], "--context 500: must be from 1 to 128"),
    (["README.md", "--stride", "0"], "--stride 0"), (["nowhere.txt"], "nowhere.txt"),
])  # fmt: skip
def test_what_cannot_be_scored_is_one_line(words, complaint, tokenizer, tmp_path, monkeypatch, capsys):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    directory = write_huggingface_directory(tmp_path / "model", SMALL, tokenizer=tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(directory), *words])
    with pytest.raises(SystemExit):
        command.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_the_harness_gets_transformers_log_likelihoods(tokenizer, tmp_path):
    """Of the export, in float32; contexts empty, short, and beyond the longest."""
    harness = pytest.importorskip("deepseek_jax.lm_eval")
    from lm_eval.api.instance import Instance

    tokenizer.save(str(tmp_path / "tokenizer.json"))
    directory = write_huggingface_directory(tmp_path / "model", SMALL, tokenizer=tmp_path)
    ours, theirs = harness.DeepSeekLM(str(directory), max_length=24, batch_size=4), from_pretrained(directory)
    pairs = [("", "import numpy"), ("def f(", "x):"), (" a long text" * 9, " has an end"), ("in", " numpy as np")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (context, wanted), (value, greedy) in zip(pairs, ours.loglikelihood(requests, disable_tqdm=True)):
        before = tokenizer.encode(context).ids or [0]
        after = tokenizer.encode(context + wanted).ids[len(before) if context else 0 :]
        tokens = torch.tensor([[*before, *after][-25:]])
        with torch.no_grad():
            known = torch.log_softmax(theirs(tokens[:, :-1]).logits[0].double(), -1)
        told = known[torch.arange(len(known)), tokens[0, 1:]][-len(after) :]
        assert abs(told.sum().item() / value - 1) < 1e-6
        assert greedy == (known.argmax(-1) == tokens[0, 1:])[-len(after) :].all().item()
    (rolling,) = ours.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("def f(x):",), 0)])
    assert abs(rolling - ours.loglikelihood([Instance("loglikelihood", {}, ("", "def f(x):"), 0)])[0][0]) < 1e-4
    wishes = [("import", 9, []), (" a long text" * 9, 5, []), ("", 7, []), ("def f(", 9, ["\n"]), ("in", 6, [])]
    asked = [Instance("generate_until", {}, (context, {"max_gen_toks": most, "until": stop}), n)
             for n, (context, most, stop) in enumerate(wishes)]  # fmt: skip
    alone = [ours.generate_until([one], disable_tqdm=True)[0] for one in asked]
    assert ours.generate_until(asked, disable_tqdm=True) == alone and len(set(alone)) > 1
    middle = alone[0][2:4]
    (cut,) = ours.generate_until([Instance("generate_until", {}, ("import", {"max_gen_toks": 9, "until": middle}), 0)])
    assert middle not in cut and alone[0].startswith(cut)
