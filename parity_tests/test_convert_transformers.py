"""What transformers makes of converted checkpoints, and what becomes of its own."""

import dataclasses
import json
from collections import Counter

import jax
import numpy as np
import pytest

import deepseek_jax.convert as conversion
from deepseek_jax.checkpoint.forms import tensor_specs
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.config import load_config
from deepseek_jax.convert import convert
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.generation.generator import Generator
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.train import train
from parity_tests.checkpoints import CONFIGS, TINY, WIDE, random_variables, write_huggingface_directory
from parity_tests.conversions import TEXT, assert_same_tree, rewritten


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
