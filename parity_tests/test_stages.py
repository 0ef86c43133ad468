"""A run in stages: each from the last one's weights, resumed in the right one, and what cannot work told beforehand."""

import shutil
from argparse import Namespace

import jax
import numpy as np
import pytest

from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.config.stages import stage_configs
from deepseek_jax.train import start
from deepseek_jax.training.loading import load_model
from deepseek_jax.training.metrics import read_metrics
from deepseek_torch.train import train as torch_train

YARN = "{factor: 4, original_max_position_embeddings: 16}"
LONGER = f"stages=[{{model: {{rope_scaling: {YARN}}}, train: {{sequence_length: 64, batch_size: 8, steps: 2}}}}]"


def test_the_reports_stages():
    """Section 4.3: 4K; 32K with 1920 sequences; 128K with 480; 1000 steps each at 7.3e-6, whatever the tokens seen."""
    stages = stage_configs(load_config("large_671b"))
    assert [(s.train.sequence_length, s.train.batch_size) for s in stages] == [(4096, 15360), (32768, 1920), (131072, 480)]
    assert stages[0].model.rope_scaling is None
    for stage in stages[1:]:
        scaling, train = stage.model.rope_scaling, stage.train
        assert (scaling.factor, scaling.beta_slow, scaling.beta_fast) == (40, 1, 32)
        assert (train.steps, train.learning_rate, train.warmup_steps) == (1000, 7.3e-6, 0)
        assert [phase.to for phase in train.learning_rate_decay] == [1.0]
    assert [s.init_from for s in stages] == [None, "runs/large_671b/stage-1", "runs/large_671b/stage-2"]


@pytest.mark.parametrize("stages, complaint", [
    ("[{train: {sequence_length: 16}}]", "stages.0: train.sequence_length=16: .* 32 tokens before; give 32 or more"),
    ("[{train: {sequence_length: 64}}, {train: {sequence_length: 48}}]", "stages.1: train.sequence_length=48: .* give 64"),
    ("[{train: {sequence_length: 256}}]", "stages.0: train.sequence_length=256: must be at most .*embeddings=128"),
    ("[{train: {sequence_lengths: 64}}]", "stages.0: unknown field train.sequence_lengths; did you mean sequence_length"),
    ("[{trains: {steps: 1}}]", "stages.0: unknown field trains; a stage has fields of model, train, data, parallel"),
    ("[{model: {hidden_size: 24}}]", "stages.0: model.hidden_size=24: .* where it is 48"),
    ("[5]", "stages.0 is 5"),
])  # fmt: skip
def test_a_stage_that_cannot_work_is_one_line(stages, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        stage_configs(load_config("tiny", [f"stages={stages}"]))
    assert "\n" not in str(caught.value)


def test_the_sibling_trains_one_at_a_time():
    with pytest.raises(ConfigError, match="stages: this sibling trains one at a time"):
        torch_train(load_config("tiny", [LONGER]))


@pytest.mark.slow
def test_stages_follow_each_other_and_go_on(tmp_path, text_file):
    """The second begins with the first's weights; what it had done is done again, the same, when it is lost."""
    run = tmp_path / "run"
    fields = [f"data.input={text_file}", f"run_dir={run}", "train.steps=2", "train.eval_sequences=2", "parallel.data=1",
              "data.held_out_fraction=0.2", LONGER]  # fmt: skip

    def train(*overrides: str, config: str | None = "tiny") -> list[dict]:
        words = Namespace(config=config, resume=config is None, overrides=[*overrides], allow=[], show_schedule=None,
                          distributed=False)  # fmt: skip
        start(words)
        return read_metrics(run / "stage-2")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        told = train(*fields)
        first, second = (load_model(run / f"stage-{n}") for n in (1, 2))
        whole = load_model(run)
        assert whole.config == second.config and whole.config.rope_scaling is not None
        assert first.config.rope_scaling is None
        assert [line["tokens"] for line in told if "loss" in line] == [512, 1024]
        with pytest.raises(ConfigError, match="already holds a run: add --resume"):
            train(*fields)
        shutil.rmtree(run / "stage-2")
        again = train(f"run_dir={run}", config=None)
    assert [line.get("loss") for line in again] == [line.get("loss") for line in told]
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first.variables["params"], second.variables["params"])
    assert 0 < max(jax.tree.leaves(apart)) < 0.05, "two steps of warm-up away from the first stage's end"
