"""The sibling's runs: gone on with exactly, changes named, damage told, and steps that are no numbers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import deepseek_torch.train as command
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.errors import UserError
from deepseek_torch.training import step as steps
from parity_tests.conversions import turn_a_bit

torch.set_num_threads(1)  # sharing out tensors as small as these costs more than it gives

FIELDS = ["train.steps=6", "train.checkpoint_every=2", "train.eval_every=3", "train.eval_sequences=2",
          "train.sequence_length=16", "model.num_hidden_layers=2", "model.num_nextn_predict_layers=0",
          "train.optimizer=muon", "train.qk_clip=0.05"]  # fmt: skip


def config(folder, name, *fields):
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join(f"The answer to question {n} is {n * n}." for n in range(300)))
    return load_config("tiny", [f"data.input={text}", f"run_dir={folder / name}", *FIELDS, *fields])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs")
    command.train(config(folder, "alone"))
    return folder


class Killed(BaseException):
    """What no run expects."""


def dies_at(monkeypatch, number):
    """The step of that number does not come to its end."""
    take = command.train_step

    def dying(state, tokens, plan, config):
        metrics = take(state, tokens, plan, config)
        if plan.step == number:
            raise Killed
        return metrics

    monkeypatch.setattr(command, "train_step", dying)


def kept(folder, name, step=6):
    place = folder / name / "states" / str(step) / "state"
    return (folder / name / "metrics.jsonl").read_text(), (place / "training.safetensors").read_bytes()


def test_another_optimizer_goes_on_with_moments_of_its_own(alone):
    shutil.copytree(alone / "alone", alone / "changed")
    fields = ["train.optimizer=adamw", "train.steps=7"]
    command.train(config(alone, "changed", *fields), resume=True, allowed=["train.optimizer", "train.steps"])
    tensors = load_file(alone / "changed/states/7/state/training.safetensors")
    assert tensors["step/lm_head.weight"] == 1 and not any(name.startswith("momentum/") for name in tensors)


def test_a_run_that_died_goes_on_exactly(alone, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_at(patch, 4)
        command.train(config(alone, "killed"))
    assert json.loads((alone / "killed/metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    with pytest.raises(ConfigError, match=r"killed: train.learning_rate was 0.003 and is 0.1 \(.*\); give what was, or"):
        command.train(config(alone, "killed", "train.learning_rate=0.1"), resume=True)
    capsys.readouterr()
    command.train(config(alone, "killed"), resume=True)
    assert "resuming after step 2" in capsys.readouterr().out
    assert kept(alone, "killed") == kept(alone, "alone")
    assert {path.name for path in (alone / "killed" / "states").iterdir()} == {"4", "6"}
    assert (alone / "killed" / "loss.png").stat().st_size > 1000


def test_damage_is_told_and_the_step_before_serves(alone, capsys):
    folder = alone / "alone" / "states"
    expected = kept(alone, "alone")
    victim = turn_a_bit(folder / "6", "state")
    command.train(config(alone, "alone"), resume=True)
    assert f"6: {victim} is not as it was written; going on from the one before" in capsys.readouterr().err
    assert kept(alone, "alone") == expected
    (folder / "4" / "state" / "training.safetensors").write_bytes(b"cut short")
    turn_a_bit(folder / "6", "state")
    with pytest.raises(CheckpointError, match=r"6: .* is not as it was written$"):
        command.train(config(alone, "alone"), resume=True)


def test_steps_that_are_no_numbers_change_nothing_and_end_the_run(tmp_path, monkeypatch, capsys):
    init = steps.init_state

    def spoilt(*args):
        state = init(*args)
        with torch.no_grad():
            state.model.model["layers"][1].mlp.gate.weight[0, 0] = torch.nan
        return state

    monkeypatch.setattr(command, "init_state", spoilt)
    told = (
        r"^step 2: loss nan, gradient norm nan: it began in the forward pass of micro-batch 1 of 1, in "
        r"model.layers.1.mlp.gate; 2 such steps in a row are train.max_skips: lower train.learning_rate, look at the data, "
    )
    with pytest.raises(UserError, match=told):
        command.train(config(tmp_path, "run", "train.max_skips=2"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 2]
    assert capsys.readouterr().out.count("no update") == 2


def test_a_file_that_changed_is_named(alone):
    of = config(alone, "alone")
    (alone / "text.txt").write_text("Not much left.\n" * 9)
    changed = (
        r"not the text that .*alone was trained on \(.*text.txt has 135 bytes and had \d+,\d+\); to go on with other text"
    )
    with pytest.raises(ConfigError, match=changed):
        command.train(of, resume=True)
