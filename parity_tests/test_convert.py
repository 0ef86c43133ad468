"""`deepseek_jax.convert`: both directions to the bit, everything that travels along, and what stops it."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deepseek_jax.convert as conversion
from deepseek_jax.checkpoint.forms import dtype_name, tensor_specs
from deepseek_jax.checkpoint.fp8_blocks import requantize_blocks
from deepseek_jax.checkpoint.hf_config import read_config_json, to_config_json
from deepseek_jax.checkpoint.orbax_source import OrbaxSource
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.safetensors_writer import write_tensors
from deepseek_jax.checkpoint.tensors import CheckpointError, TensorSpec
from deepseek_jax.config import Config, TrainConfig, load_config, to_yaml
from deepseek_jax.convert import convert
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.generate import Generator
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.train import train
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.step import TrainState
from parity_tests.checkpoints import CONFIGS, TINY, WIDE, contents, random_variables, write_huggingface_directory

TEXT = "Once upon a time there was a checkpoint; it went from one framework to another and lost nothing. " * 40


def make_run(path, model, step=7):
    """A run as training leaves it: config, tokenizer, and a checkpoint with moments."""
    config = Config(model=model, train=TrainConfig(sequence_length=16), run_dir=str(path))
    variables = random_variables(model)
    optimizer = make_optimizer(config.train).init(variables["params"])
    checkpoints = Checkpoints(path, config)
    checkpoints.save(step, TrainState(variables["params"], variables["router_state"], optimizer))
    checkpoints.wait()
    (path / "config.yaml").write_text(to_yaml(config))
    train_tokenizer([TEXT], model.vocab_size).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "wide", WIDE)


@pytest.fixture(scope="module")
def exported(run):
    """The same model for Hugging Face, in float32 and several files."""
    destination = run.parent / "exported"
    convert(run, destination, max_shard_size="300KB", verify=True)
    return destination


def assert_same_tree(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def fails(*words):
    """The next call fails with one line that has all these words in it."""

    class Caught:
        def __enter__(self):
            self.raises = pytest.raises(UserError)
            self.info = self.raises.__enter__()
            return self.info

        def __exit__(self, *error):
            swallowed = self.raises.__exit__(*error)
            message = str(self.info.value)
            assert "\n" not in message
            for word in words:
                assert word in message, message
            return swallowed

    return Caught()


def rewritten(source, destination, change):
    """A copy of a Hugging Face directory, its tensors changed by `change`, which is given them by name."""
    tensors = SafetensorsDirectory(source)
    arrays = {name: tensors.read(name) for name in tensors.names}
    change(arrays)
    destination.mkdir()
    shutil.copyfile(source / "config.json", destination / "config.json")
    specs = [TensorSpec(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items()]
    write_tensors(destination, specs, arrays.values())
    return destination


def with_config(source, destination, **changes):
    """A copy of a Hugging Face directory with other values in config.json; None takes a key away."""
    shutil.copytree(source, destination)
    content = json.loads((source / "config.json").read_text()) | changes
    (destination / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return destination


# Round trips


FORMS_OF_CONFIGS = [(name, dtype) for name in CONFIGS for dtype in ("float32", "fp8")]


@pytest.mark.parametrize(("name", "dtype"), [*FORMS_OF_CONFIGS, ("wide", "bfloat16"), ("tied", "bfloat16")])
def test_there_and_back_gives_the_same_files(name, dtype, tmp_path):
    source = write_huggingface_directory(tmp_path / "source", CONFIGS[name], dtype)
    convert(source, tmp_path / "run", verify=True)
    convert(tmp_path / "run", tmp_path / "back", verify=True)
    assert contents(tmp_path / "back") == contents(source)
    config = load_config(tmp_path / "run" / "config.yaml")
    stored = {"fp8": "bfloat16"}.get(dtype, dtype)
    assert config.model == dataclasses.replace(CONFIGS[name], precision=stored)


def test_a_run_comes_back_equal(run, exported, tmp_path):
    convert(exported, tmp_path / "back", verify=True)
    config = load_config(tmp_path / "back" / "config.yaml")
    assert config.model == WIDE
    restored = Checkpoints(tmp_path / "back", config).restore(0)
    expected = random_variables(WIDE)
    assert_same_tree(restored.params, expected["params"])
    assert_same_tree(restored.router_state, expected["router_state"])
    assert len(list(exported.glob("model-*.safetensors"))) > 3
    assert_same_tree(load_pretrained(exported), (WIDE, expected))


def test_a_step_alone(run, exported, tmp_path):
    convert(run / "checkpoints" / "7", tmp_path / "out", max_shard_size="300KB")
    assert contents(tmp_path / "out") == contents(exported)


def test_what_bfloat16_holds_survives_it(run, tmp_path):
    convert(run, tmp_path / "out", dtype="bfloat16")
    assert_same_tree(load_pretrained(tmp_path / "out")[1], random_variables(WIDE))
    convert(tmp_path / "out", tmp_path / "run", dtype="float32")
    restored = Checkpoints(tmp_path / "run", load_config(tmp_path / "run" / "config.yaml")).restore(0)
    assert_same_tree(load_pretrained(tmp_path / "out")[1]["params"], restored.params)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_codes_and_scales_come_back_to_the_byte(dtype, tmp_path):
    """Scales that recomputing would not find, and a matrix that DeepSeek's form leaves alone."""
    rng = np.random.default_rng(3)
    source = write_huggingface_directory(tmp_path / "source", WIDE, "fp8")

    def other_scales(arrays):
        projection = f"model.layers.{WIDE.num_hidden_layers}.eh_proj.weight"
        weights = arrays[projection].astype(np.float32)
        scales = np.full([-(-n // 128) for n in weights.shape], 2.0**-9, np.float32)
        arrays[projection] = requantize_blocks(np.zeros_like(weights), scales)
        arrays[projection].view(np.uint8)[:] = rng.integers(0, 0x7F, weights.shape, np.uint8)
        arrays[f"{projection}_scale_inv"] = scales
        for name, array in arrays.items():
            if name.endswith("scale_inv"):
                array *= rng.uniform(0.1, 10, array.shape).astype(np.float32)

    changed = rewritten(source, tmp_path / "changed", other_scales)
    convert(changed, tmp_path / "run", dtype=dtype, verify=True)
    convert(tmp_path / "run", tmp_path / "back", verify=True)
    for name in (tensors := SafetensorsDirectory(changed)).names:
        assert tensors.read(name).tobytes() == SafetensorsDirectory(tmp_path / "back").read(name).tobytes(), name
    convert(tmp_path / "run", tmp_path / "float32", dtype="float32")
    if dtype is None:
        assert_same_tree(load_pretrained(tmp_path / "float32")[1], load_pretrained(changed)[1])


@pytest.mark.parametrize("piece", [None, 2**40, 2**20])
def test_pieces_of_any_size_are_read(piece, tmp_path, monkeypatch):
    """Training saves matrix by matrix; others save an array whole, or cut through its matrices."""
    if piece is not None:
        args = ocp.SaveArgs(chunk_byte_size=piece)
        piecewise = "deepseek_jax.training.checkpoint._piecewise"
        monkeypatch.setattr(piecewise, lambda config, variables: jax.tree.map(lambda leaf: args, variables))
    variables = random_variables(WIDE)
    gate = ("params", "moe_layers", "mlp", "experts", "gate_proj")
    shape = variables["params"]["moe_layers"]["mlp"]["experts"]["gate_proj"].shape
    source = OrbaxSource(make_run(tmp_path / "run", WIDE) / "checkpoints" / "7")
    expected = {None: (1, 1, *shape[2:]), 2**40: shape, 2**20: (*shape[:2], shape[2] // 2, shape[3])}[piece]
    assert source._stores[gate].chunk_layout.read_chunk.shape == expected
    convert(tmp_path / "run", tmp_path / "out")
    assert_same_tree(load_pretrained(tmp_path / "out")[1], variables)


# In the hands of transformers


@pytest.fixture(scope="module")
def transformers_model(exported):
    transformers = pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        # It knows MTP layers by the number that they have in V3.
        pattern = rf"model\.layers\.{WIDE.num_hidden_layers}.*|model\.layers\.{WIDE.num_hidden_layers + 1}.*"
        patch.setattr(transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [pattern])
        yield transformers.AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)


def test_transformers_computes_the_same(exported, transformers_model):
    import torch
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    model, info = transformers_model
    assert model.dtype == torch.float32
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config, variables = load_pretrained(exported)
    tokens = np.random.default_rng(0).integers(0, WIDE.vocab_size, (2, 14))
    length = 14 - WIDE.num_nextn_predict_layers
    output = DeepseekV3(config).apply(variables, tokens)
    ours = np.asarray(output.hidden @ output.head)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens[:, :length]), output_hidden_states=True)
        logits = [theirs.logits.numpy()]
        mtp, hidden = MtpModel.from_pretrained(model), theirs.hidden_states[-1]
        cache = MtpCache(config=mtp.config)
        for k in range(1, WIDE.num_nextn_predict_layers + 1):
            ahead = torch.from_numpy(tokens[:, k : k + length])
            hidden = mtp.forward_layer(k - 1, hidden, torch.arange(length)[None] + k, cache, input_ids=ahead)
            logits.append(model.lm_head(hidden).numpy())
    for mine, its in zip(ours, logits, strict=True):
        np.testing.assert_allclose(mine, its, rtol=0, atol=1e-5 * np.abs(its).max())

    prompt = tokens[:1, :8]
    generated = model.generate(torch.from_numpy(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None)
    steps = Generator(config, variables).generate(prompt.tolist(), 20, None)
    assert generated[0, 8:].tolist() == [int(step[0]) for step in steps]


def test_transformers_reads_the_tokenizer(run, exported):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = conversion.load_tokenizer(run)
    text = "Once upon a time\n\tthere was  a café, 東京 12345; it went <eos> on."
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False).ids
    assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
    assert theirs.eos_token_id == ours.token_to_id("<|endoftext|>") == 0 and len(theirs) <= WIDE.vocab_size
    assert theirs.model_max_length == WIDE.max_position_embeddings
    assert transformers.GenerationConfig.from_pretrained(exported).eos_token_id == 0
    config = transformers.AutoConfig.from_pretrained(exported)
    assert config.eos_token_id == 0 and config.rope_parameters["rope_type"] == "yarn"


def test_older_readers_find_their_keys(exported):
    content = json.loads((exported / "config.json").read_text())
    assert content["architectures"] == ["DeepseekV3ForCausalLM"] and content["model_type"] == "deepseek_v3"
    assert content["torch_dtype"] == content["dtype"] == "float32"
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == WIDE.rope_theta
    assert content["rope_scaling"] == {"type": "yarn", **dataclasses.asdict(WIDE.rope_scaling)}


@pytest.mark.parametrize("name", ["tiny", "wide", "tied"])
def test_what_transformers_saved_is_read(name, tmp_path):
    """Its own spelling of config.json, and no MTP layers although it speaks of them."""
    transformers = pytest.importorskip("transformers")
    source = write_huggingface_directory(tmp_path / "source", CONFIGS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "theirs")
    config, variables = load_pretrained(tmp_path / "theirs")
    expected = random_variables(CONFIGS[name])
    del expected["params"]["mtp_layers"], expected["router_state"]["mtp_layers"]
    assert config == dataclasses.replace(CONFIGS[name], num_nextn_predict_layers=0)
    assert_same_tree(variables, expected)


def test_absent_mtp_layers_are_told_of(exported, tmp_path, capsys):
    last = WIDE.num_hidden_layers

    def drop(arrays):
        for name in [n for n in arrays if n.startswith((f"model.layers.{last}.", f"model.layers.{last + 1}."))]:
            del arrays[name]

    convert(rewritten(exported, tmp_path / "main", drop), tmp_path / "run")
    assert "num_nextn_predict_layers is 2 and there are no tensors of MTP layers" in capsys.readouterr().out
    assert load_config(tmp_path / "run" / "config.yaml").model.num_nextn_predict_layers == 0


# On paper: the released repository


def test_all_of_v3():
    config = load_config("large_671b").model
    fp8, bf16 = tensor_specs(config, "fp8"), tensor_specs(config, "bfloat16")
    assert len(fp8) == 91_991 and len(bf16) == 46_183
    scales = {s.name: s for s in fp8 if s.name.endswith("_scale_inv")}
    count, biases = len(scales), 59
    rest = 46_183 - count - biases
    assert Counter(s.dtype for s in fp8) == {"F8_E4M3": count, "F32": count + biases, "BF16": rest}
    assert Counter(s.dtype for s in bf16) == {"F32": biases, "BF16": 46_183 - biases}
    for spec in fp8:
        if spec.dtype == "F8_E4M3":
            assert scales[f"{spec.name}_scale_inv"].shape == tuple(-(-n // 128) for n in spec.shape)
    by_name = {s.name: s for s in fp8}
    assert by_name["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 56)
    # The biases are no parameters.
    main = sum(np.prod(s.shape, dtype=np.int64) for s in bf16 if not s.name.startswith("model.layers.61."))
    assert main == 671_026_404_352 + 58 * 256


def test_names_and_shapes_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    import torch

    from parity_tests.transformers_oracle import split_experts

    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config())
    theirs = {name: tuple(t.shape) for name, t in split_experts(model.state_dict()).items()}
    ours = {s.name: s.shape for s in tensor_specs(load_config("large_671b").model, "bfloat16")}
    assert theirs == {name: shape for name, shape in ours.items() if not name.startswith("model.layers.61.")}


def test_layer_61_is_as_documented():
    """A whole layer with experts, its own norms and projection, and copies of embedding and head."""
    ours = {s.name: (s.dtype, s.shape) for s in tensor_specs(load_config("large_671b").model, "fp8")}
    prefix, before = "model.layers.61.", "model.layers.60."
    layer = {name.removeprefix(prefix): kind for name, kind in ours.items() if name.startswith(prefix)}
    block = {name.removeprefix(before): kind for name, kind in ours.items() if name.startswith(before)}
    own = {name: kind for name, kind in layer.items() if name not in block}
    assert {name: kind for name, kind in layer.items() if name in block} == block
    assert own == {
        "embed_tokens.weight": ("BF16", (129280, 7168)), "enorm.weight": ("BF16", (7168,)),
        "hnorm.weight": ("BF16", (7168,)), "eh_proj.weight": ("BF16", (7168, 14336)),
        "shared_head.norm.weight": ("BF16", (7168,)), "shared_head.head.weight": ("BF16", (129280, 7168)),
    }  # fmt: skip


# Going on from there


def test_training_goes_on_from_what_came(tmp_path, capsys):
    """With the tokenizer that came, and out again; scales of old are not kept beside new weights."""
    tokenizer = train_tokenizer([TEXT[:2000]], 300)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "more.txt").write_text(TEXT[::-1])
    model = dataclasses.replace(TINY, num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0)
    source = write_huggingface_directory(tmp_path / "hf", model, "fp8", tokenizer=tmp_path / "tokenizer")
    convert(source, tmp_path / "run", verify=True)
    overrides = [f"data.input=[{tmp_path}/text.txt,{tmp_path}/more.txt]", "train.steps=1", "train.batch_size=8",
                 "train.sequence_length=16", "train.eval_sequences=3", "data.held_out_fraction=0.5",
                 "model.precision=float32"]  # fmt: skip
    train(load_config(tmp_path / "run" / "config.yaml", overrides), resume=True)
    assert conversion.load_tokenizer(tmp_path / "run").get_vocab() == tokenizer.get_vocab()
    convert(tmp_path / "run", tmp_path / "out", verify=True)
    assert "out: Hugging Face, float32" in capsys.readouterr().out
    before, after = (load_pretrained(path)[1]["params"] for path in (source, tmp_path / "out"))
    moved = jax.tree.map(lambda a, b: 0 < np.abs(a - b).max() < 1e-4, before, after)
    assert all(jax.tree.leaves(moved))
    companions = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in companions)


# The command


def command(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "deepseek_jax.convert", *map(str, arguments)], capture_output=True, text=True
    )
    return result.returncode, result.stdout, result.stderr


def test_a_dry_run_says_what_a_run_does(run, exported, tmp_path, capsys):
    convert(run, tmp_path / "out", dry_run=True, max_shard_size="300KB")
    said = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.iterdir())
    tensors = SafetensorsDirectory(exported)
    assert f"{len(tensors.names)} tensors ({len(tensors.names)} F32), {tensors.nbytes:,} bytes" in said[1]
    assert said[1].endswith(f"in {len(list(exported.glob('*.safetensors')))} files")
    assert said[-1] == "dry run: nothing was written"
    convert(exported, tmp_path / "run", dtype="bfloat16", dry_run=True)
    assert not list(tmp_path.iterdir()) and "BF16" in capsys.readouterr().out


def test_from_the_command_line(exported, tmp_path):
    code, out, err = command(exported, tmp_path / "run", "--dtype", "bfloat16", "--verify")
    assert (code, err) == (0, "") and "written and verified" in out
    code, out, err = command(exported, tmp_path / "run")
    assert code == 1 and err.count("\n") == 1 and "is there already" in err


def test_torch_is_not_imported():
    code = "import sys, deepseek_jax.convert; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_verifying_sees_a_changed_byte(run, exported, tmp_path, monkeypatch):
    def spoil(name, directory_of):
        write = getattr(conversion, name)

        def spoiled(*arguments, **options):
            write(*arguments, **options)
            path = directory_of(arguments[0])
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

        monkeypatch.setattr(conversion, name, spoiled)

    spoil("write_huggingface", lambda partial: sorted(partial.glob("*.safetensors"))[1])
    with fails("what was read back is not what was written"):
        convert(run, tmp_path / "out", max_shard_size="300KB", verify=True)
    array = "checkpoints/0/variables/params.moe_layers.mlp.experts.up_proj/1.2.0.0"
    spoil("write_run", lambda partial: partial / array)
    with fails("model.layers.2.mlp.experts.2.up_proj.weight", "what was read back is not what was written"):
        convert(exported, tmp_path / "out", verify=True)
    assert not list(tmp_path.iterdir())


# Interruption


@pytest.mark.parametrize("direction", ["to Hugging Face", "from Hugging Face"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space")])
def test_an_interruption_leaves_nothing_and_can_be_repeated(direction, error, run, exported, tmp_path, monkeypatch):
    source = run if direction == "to Hugging Face" else exported
    kind = conversion.OrbaxSource if direction == "to Hugging Face" else conversion.HuggingFaceSource
    read, calls = kind.read, []

    def interrupted(self, place):
        calls.append(place)
        if len(calls) == 50:
            raise error
        return read(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "read", interrupted)
        with pytest.raises((KeyboardInterrupt, OSError, CheckpointError)):
            convert(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    convert(source, tmp_path / "out", verify=True)


def test_a_killed_conversion_can_be_repeated(exported, tmp_path):
    code = (
        "import os, sys; from pathlib import Path; import deepseek_jax.convert as c; read = c.HuggingFaceSource.read\n"
        "def killed(self, place):\n"
        "    if 'layers.2' in place.name: os.kill(os.getpid(), 9)\n"
        "    return read(self, place)\n"
        "c.HuggingFaceSource.read = killed; c.convert(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    killed = subprocess.run([sys.executable, "-c", code, exported, tmp_path / "out"], capture_output=True)
    assert killed.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [".out.deepseek-jax-partial"]
    convert(exported, tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# What stops it


def test_every_tensor_at_fault_is_named(exported, tmp_path):
    def spoil(arrays):
        del arrays["model.layers.1.mlp.experts.3.up_proj.weight"], arrays["model.norm.weight"]
        arrays["model.layers.0.rotary.inv_freq"] = np.zeros(4, np.float32)
        arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]
        arrays["model.layers.2.input_layernorm.weight"] = arrays["model.layers.2.input_layernorm.weight"].astype("f2")

    source = rewritten(exported, tmp_path / "source", spoil)
    with fails(
        str(source), "2 missing: model.layers.1.mlp.experts.3.up_proj.weight, model.norm.weight",
        "1 left over: model.layers.0.rotary.inv_freq", "wrong shape: lm_head.weight [319, 136] for [320, 136]",
        "wrong dtype: model.layers.2.input_layernorm.weight F16 for F32",
    ):  # fmt: skip
        convert(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_float8_needs_its_scales_and_scales_need_float8(tmp_path):
    source = write_huggingface_directory(tmp_path / "source", TINY, "fp8")
    weight = "model.layers.1.self_attn.o_proj.weight"

    def spoil(change):
        spoil.count += 1
        return rewritten(source, tmp_path / f"{spoil.count}", change)

    spoil.count = 0
    with fails(f"1 missing: {weight}_scale_inv"):
        load_pretrained(spoil(lambda arrays: arrays.pop(f"{weight}_scale_inv")))
    with fails(f"1 left over: {weight}_scale_inv"):
        load_pretrained(spoil(lambda arrays: arrays.update({weight: arrays[weight].astype("bfloat16")})))
    with fails("model.norm.weight F8_E4M3 for BF16"):
        norm = "model.norm.weight"
        load_pretrained(spoil(lambda arrays: arrays.update({norm: arrays[norm].astype("float8_e4m3fn")})))
    with fails(f"model.safetensors: {weight}: scale [0, 0] is nan"):
        convert(spoil(lambda arrays: arrays[f"{weight}_scale_inv"].fill(np.nan)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with fails("--dtype fp8", "Hugging Face"):
        convert(write_huggingface_directory(tmp_path / "float32"), tmp_path / "run", dtype="fp8")


def test_copies_must_be_copies(exported, tmp_path):
    copy = f"model.layers.{WIDE.num_hidden_layers + 1}.shared_head.head.weight"

    def change_one(arrays):
        arrays[copy][3, 4] += 1

    with fails(copy, "is not equal to lm_head.weight"):
        convert(rewritten(exported, tmp_path / "source", change_one), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["model_type is llama"]),
        ({"attention_bias": True}, ["attention_bias is True"]),
        ({"scoring_func": "softmax"}, ["scoring_func is softmax"]),
        ({"topk_method": "greedy"}, ["topk_method is greedy"]),
        ({"hidden_act": "gelu"}, ["hidden_act is gelu"]),
        ({"rope_interleave": False}, ["rope_interleave is False"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq is 2"]),
        ({"num_key_value_heads": 1}, ["num_key_value_heads is 1"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ["rope_parameters.rope_type is linear"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "attention_factor": 1.5}}, ["attention_factor is 1.5"]),
        ({"rope_parameters": [], "rope_scaling": None}, ["rope_parameters is []"]),
        ({"rope_theta": 5.0}, ["rope_parameters.rope_theta is 10000.0", "rope_theta is 5.0"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope_scaling is"]),
        ({"num_mtp_layers": 3}, ["num_mtp_layers is 3", "num_nextn_predict_layers is 2"]),
        ({"hidden_size": "wide"}, ["model.hidden_size is 'wide'"]),
        ({"n_group": 3}, ["model.n_group=3"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config.quant_method is awq"]),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, ["size is [64, 64]"]),
        ({"hidden_size": 128}, ["wrong shape", "model.norm.weight [136] for [128]"]),
        ({"num_nextn_predict_layers": 1}, ["left over: model.layers.5."]),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_other_mathematics(changes, words, exported, tmp_path):
    source = with_config(exported, tmp_path / "source", **changes)
    with fails(str(source), *words):
        convert(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 300)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["${x:y}", "${", "???", "1e12", 10**12]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(to_config_json(WIDE, "fp8", {}))
ROPE_KEYS = [*dataclasses.asdict(WIDE.rope_scaling), "type", "rope_type", "rope_theta"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KEYS), VALUES | st.dictionaries(st.sampled_from(ROPE_KEYS), VALUES | st.just("yarn"), max_size=4))
def test_any_value_in_a_config_is_taken_or_refused_in_one_line(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(to_config_json(WIDE, "fp8", {}) | {key: value}))
    try:
        read_config_json(tmp_path)
    except UserError as error:
        assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)


def test_either_spelling_of_a_config_is_read(exported, tmp_path):
    for number, absent in enumerate((["rope_parameters", "dtype"], ["rope_scaling", "rope_theta", "torch_dtype"])):
        source = with_config(exported, tmp_path / str(number), **dict.fromkeys(absent, ...))
        assert load_pretrained(source)[0] == WIDE


def test_what_is_no_checkpoint(run, exported, tmp_path):
    with fails("there is no checkpoint", "config.json", "checkpoints"):
        convert(tmp_path, tmp_path / "out")
    both = shutil.copytree(exported, tmp_path / "both")
    shutil.copytree(run / "checkpoints", both / "checkpoints")
    shutil.copyfile(run / "config.yaml", both / "config.yaml")
    with fails("a Hugging Face directory and a run directory"):
        convert(both, tmp_path / "out")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    with fails("no checkpoint is complete"):
        convert(tmp_path / "run", tmp_path / "out")
    with fails("size 0GB"):
        convert(run, tmp_path / "out", max_shard_size="0GB")


def test_a_damaged_step(exported, tmp_path):
    convert(exported, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "0"
    array = step / "variables" / "params.moe_layers.mlp.experts.gate_proj"
    lost = (array / "1.2.0.0").read_bytes()
    (array / "1.2.0.0").unlink()
    with fails("model.layers.2.mlp.experts.2.gate_proj.weight: cannot be read"):
        convert(tmp_path / "run", tmp_path / "out")
    (array / "1.2.0.0").write_bytes(lost[:-5])
    with fails("model.layers.2.mlp.experts.2.gate_proj.weight: cannot be read"):
        convert(tmp_path / "run", tmp_path / "out")
    array.rename(tmp_path / "array")
    with fails("params.moe_layers.mlp.experts.gate_proj: cannot be opened"):
        convert(tmp_path / "run", tmp_path / "out")
    (tmp_path / "array").rename(array)
    meta = json.loads((step / "meta" / "metadata").read_text())
    (step / "meta" / "metadata").write_text(json.dumps(meta | {"model": meta["model"] | {"hidden_size": 7}}))
    with fails("wrong shape: params.embed_tokens.weight [320, 136] for [320, 7]"):
        convert(step, tmp_path / "out")
    (step / "meta" / "metadata").write_text("{")
    with fails("metadata", "not JSON"):
        convert(step, tmp_path / "out")
    assert not (tmp_path / "out").exists()
