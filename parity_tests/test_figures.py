"""A model's figures against those who know: transformers' modules, compiled programs, the checkpoints' writers."""

import dataclasses
import json
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from deepseek_jax.checkpoint.forms import FORMS
from deepseek_jax.checkpoint.hf_files import SINGLE_FILE
from deepseek_jax.checkpoint.pretrained import save_pretrained
from deepseek_jax.config import Config, TrainConfig, load_config, presets
from deepseek_jax.parallel.mesh import ALONE, resolve
from deepseek_jax.planning.figures import (
    CORE,
    PROJECTIONS,
    Flops,
    as_dict,
    cache_bytes,
    checkpoint_bytes,
    count_parameters,
    figures,
    flops_by_part,
    part_of,
    table,
)
from deepseek_jax.planning.products import product_flops
from deepseek_jax.planning.program import Visit, visits
from deepseek_jax.training.ahead import compile_step
from deepseek_jax.training.step import init_state
from parity_tests.checkpoints import CONFIGS, random_variables
from parity_tests.modules import COMPILE_QUICKLY
from parity_tests.transformers_oracle import split_experts, transformers_config

PRESETS = {"mini": (2.7e9, 340e6), "small": (16e9, 2.8e9), "medium": (67e9, 8e9), "large_671b": (671e9, 37e9)}
"""Total and active parameters that each is meant to have, without MTP."""

SHORT = Config(
    dataclasses.replace(
        load_config("benchmark").model, vocab_size=512, hidden_size=256, num_hidden_layers=2, intermediate_size=768,
        n_routed_experts=8, num_experts_per_tok=2, num_nextn_predict_layers=1, remat="full", grouped_matmul="reference",
    ),
    train=TrainConfig(sequence_length=32, batch_size=16, loss_chunk_tokens=1024),
    parallel=ALONE,
)  # fmt: skip
"""A layer of each kind and one chunk of logits, so that no loops are left but those over the experts."""
TOKENS = SHORT.train.batch_size * SHORT.train.sequence_length


# Parameters


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_parameters_of_transformers_modules(preset):
    model = load_config(preset).model
    with torch.device("meta"):
        theirs = DeepseekV3ForCausalLM(transformers_config(model))
    sizes = {name: tensor.numel() for name, tensor in split_experts(dict(theirs.named_parameters())).items()}
    met = (size for name, size in sizes.items() if _expert(name) < model.num_experts_per_tok)
    assert count_parameters(model)[:2] == (sum(sizes.values()), sum(met))


def _expert(name: str) -> int:
    """The number of a routed expert's tensor; others belong to every token, as do the first of the experts."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_size_they_are_meant_to_have(preset):
    count = count_parameters(load_config(preset).model)
    assert count[:2] == pytest.approx(PRESETS[preset], rel=0.03)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_commands_in_a_presets_head_fit_their_devices(preset):
    text = presets()[preset].read_text().replace("\\\n#", "")
    commands = re.findall(r"^# On (\d+) .*\n#   python -m deepseek_jax.train (.*)$", text, re.MULTILINE)
    assert len(commands) == text.count("# On ") > 0
    for devices, words in commands:
        overrides = [word for word in words.split() if "=" in word]
        assert f"--config {preset} " in words
        resolve(load_config(preset, overrides), int(devices))


@pytest.mark.parametrize("name", ["wide", "tied, no mtp", "all experts"])
def test_every_parameter_has_a_part(name):
    config = dataclasses.replace(load_config("tiny"), model=CONFIGS[name])
    found, params = figures(config), jax.eval_shape(partial(init_state, config)).params
    assert sum(of.total for of in found.parameters.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found.count.total + found.count.mtp == sum(of.total for of in found.parameters.values())
    assert found.flops["head"].forward == 2 * config.model.hidden_size * config.model.vocab_size  # also where it is tied


def test_deepseek_v3():
    found = figures(load_config("large_671b"))
    assert found.count == (671_026_404_352, 37_552_282_624, 11_610_067_968)
    assert found.cache == (61 * 576 * 2, 61 * 128 * (192 + 128) * 2)
    assert found.cache.ratio == pytest.approx(71.1, abs=0.05)


# Products


@pytest.fixture(scope="module")
def step() -> jax.stages.Compiled:
    return compile_step(SHORT, jax.devices()[:1]).compiled


def test_products_are_those_of_the_compiled_step(step):
    """By part and pass, to the last but for attention's own, of which a program makes some that the mask voids."""
    program = Counter()
    for visit in visits(step.as_text()):
        if visit.instruction.opcode == "dot":
            assert not visit.open_loops
            program[_part_and_pass(visit)] += visit.times * product_flops(visit.instruction, visit.operands)
    expected = Counter()
    for part, flops in flops_by_part(SHORT.model, SHORT.train.sequence_length).items():
        # The plainest form, of a length known beforehand, multiplies every row by every expert.
        times = TOKENS * (SHORT.model.n_routed_experts if part.split("/")[-1] == "experts" else 1)
        for name, count in flops._asdict().items():
            # The loss takes the states of all depths together and makes its gradient beside it.
            key = ("head", "forward") if part.endswith("head") else (part, name)
            expected[key] += times * count
    assert program.keys() == {key for key, count in expected.items() if count}
    for (part, name), count in expected.items():
        if not part.endswith(CORE):
            assert program[part, name] == count, (part, name)
            continue
        if name == "backward":
            count += expected[part, "forward"] * 96 / (96 + 64)  # the scores again
        assert count <= program[part, name] <= 2 * count, (part, name)


def _part_and_pass(product: Visit) -> tuple[str, str]:
    """Where the compiler says that a product comes from; attention's own have the heads as an axis."""
    rest = product.instruction.rest
    name = re.search(r'op_name="([^"]*)"', rest)[1]
    part = part_of(name.split("/")) or "head"
    if "lhs_batch_dims" in rest:
        part = part.replace(PROJECTIONS, CORE)
    if "rematted_computation" in name:
        return part, "again"
    return part, "backward" if "transpose(" in name else "forward"


def test_products_are_what_xla_counts(step):
    """XLA counts the loops over experts once, and so their rows with one expert each, as they are meant to be. It adds
    what is not a product, little at these widths.
    """
    ours = sum(sum(flops) for flops in flops_by_part(SHORT.model, SHORT.train.sequence_length).values())
    assert step.cost_analysis()["flops"] == pytest.approx(TOKENS * ours, rel=0.05)


def test_attention_counts_half_of_what_its_definition_multiplies():
    """Forward and backward, where the scores are kept and the mask spares nothing."""
    model, length = SHORT.model, 32
    widths = {"q": 96, "k": 96, "v": 64}
    shapes = {name: jax.ShapeDtypeStruct((1, length, model.num_attention_heads, width), "float32")
              for name, width in widths.items()}  # fmt: skip

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.where(jnp.tri(length, dtype=bool), jnp.einsum("bthd,bshd->bhts", q, k), -jnp.inf)
        return jnp.sum(jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores), v) ** 2)

    both = jax.jit(jax.value_and_grad(attend, argnums=(0, 1, 2)), compiler_options=COMPILE_QUICKLY)
    text = both.lower(*shapes.values()).compile().as_text()
    program = sum(
        product_flops(visit.instruction, visit.operands) for visit in visits(text) if visit.instruction.opcode == "dot"
    )
    core = flops_by_part(model, length)[CORE]
    assert program == 2 * length * (core.forward + core.backward) / model.num_hidden_layers


def test_attention_alone_grows_with_the_length():
    short, long = (flops_by_part(SHORT.model, length) for length in (1024, 4096))
    for part, flops in short.items():
        assert long[part] == (Flops(*(4 * count for count in flops)) if part.endswith(CORE) else flops)


# Bytes


def test_a_cache_of_512_for_4096_wide_keys_and_values():
    """32 heads of 128: 576 numbers for 8192. (The 87.5% that 512 spare of 4096 are those of the keys alone.)"""
    model = dataclasses.replace(
        load_config("large_671b").model, hidden_size=4096, num_attention_heads=32, qk_nope_head_dim=64,
        qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, num_hidden_layers=1,
    )  # fmt: skip
    assert cache_bytes(model) == (576 * 2, 8192 * 2)
    assert 1 - 1 / cache_bytes(model).ratio == pytest.approx(0.93, abs=0.001)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tiny", "wide", "tied"])
def test_checkpoints_have_the_bytes_that_are_written(name, form, tmp_path):
    """A file begins with the length of its header and the header."""
    save_pretrained(tmp_path / "out", CONFIGS[name], random_variables(CONFIGS[name]), form)
    written = (tmp_path / "out" / SINGLE_FILE).read_bytes()
    header = 8 + int.from_bytes(written[:8], "little")
    config = dataclasses.replace(load_config("tiny"), model=CONFIGS[name])
    as_large = "bfloat16" if form == "float16" else form
    assert checkpoint_bytes(config)[as_large] == len(written) - header


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_training_state_has_the_bytes_of_its_arrays(moments):
    config = load_config("tiny", [f"train.adam_moment_dtype={moments}"])
    state = jax.eval_shape(partial(init_state, config))
    assert checkpoint_bytes(config)["training state"] == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    found, count = figures(config), sum(leaf.size for leaf in jax.tree.leaves(state.params))
    read_and_written = {"float32": 4 + 2 * (4 + 4 + 4), "bfloat16": 4 + 2 * (4 + 2 + 2)}[moments]
    counter = 4
    assert found.optimizer_bytes == read_and_written * count + 2 * counter


# For people and programs


@pytest.mark.parametrize("preset", ["tiny", "quickstart", *PRESETS])
def test_a_table_fits_100_columns(preset):
    found = figures(load_config(preset))
    lines = table(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert f"{found.count.total:,} parameters, {found.count.active:,} active per token" in lines[0]


def test_a_program_reads_the_same():
    found = figures(load_config("tiny"))
    read = json.loads(json.dumps(as_dict(found)))
    assert read["parameters"]["total"] == found.count.total
    assert read["parameters"]["by_part"]["experts"] == {"total": 3 * 8 * 3 * 48 * 20, "active": 3 * 3 * 3 * 48 * 20}
    flops = read["flops_per_token"]
    assert flops["forward"] == sum(of["forward"] for of in flops["by_part"].values())
    assert read["cache_bytes_per_token"]["ratio"] == found.cache.ratio
    assert read["checkpoint_bytes"] == found.checkpoints


def test_every_form_is_counted():
    """The guide's forms have weights of their own; none is left out."""
    forms = [
        "feed_forward=gelu",
        "shared_expert_gate=true",
        "n_shared_experts=2",
        "mtp_form=parallel",
        "num_nextn_predict_layers=2",
    ]
    model = load_config("tiny", [f"model.{form}" for form in forms]).model
    params = jax.eval_shape(partial(init_state, Config(model=model))).params
    count = count_parameters(model)
    assert count.total + count.mtp == sum(leaf.size for leaf in jax.tree.leaves(params))
