"""Ways in which the same weights are stored: dtypes, files, names; what comes in one goes out in it again."""

import dataclasses
import functools
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch

from deepseek_jax.checkpoint.hf_files import INDEX_FILE, SINGLE_FILE
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.config import load_config
from deepseek_jax.convert import convert
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_torch.pretrained import load_pretrained as load_torch
from parity_tests.checkpoints import TINY, write_huggingface_directory
from parity_tests.conversions import assert_same_tree, fails, rewritten, with_config
from parity_tests.weights import to_torch

SMALL = dataclasses.replace(TINY, num_hidden_layers=2)
MTP = "model.layers.2."
BIAS = "mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A directory by its dtype; to be read only."""
    folder = tmp_path_factory.mktemp("plain")
    return functools.cache(lambda dtype: write_huggingface_directory(folder / dtype, SMALL, dtype))


def there_and_back(source, tmp_path, **options):
    """Through a run; both readers must agree on it."""
    convert(source, tmp_path / "run", verify=True, **options)
    convert(tmp_path / "run", tmp_path / "back", verify=True)
    config, variables = load_pretrained(source)
    state = load_torch(source).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in to_torch(variables, config).items())
    return SafetensorsDirectory(tmp_path / "back")


def assert_same_tensors(ours, theirs, but=()):
    assert set(theirs.names) - set(ours.names) == set(but) and not set(ours.names) - set(theirs.names)
    for name in ours.names:
        a, b = ours.read(name), theirs.read(name)
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes()), name


def test_float16(tmp_path, plain):
    def change(arrays):
        for name in arrays:
            arrays[name] = arrays[name].astype(np.float16)

    source = rewritten(plain("bfloat16"), tmp_path / "source", change)
    back = there_and_back(source, tmp_path)
    assert_same_tensors(back, SafetensorsDirectory(source))
    assert back.entries[f"model.layers.1.{BIAS}"].dtype == "F16"
    config = load_config(tmp_path / "run" / "config.yaml")
    restored = Checkpoints(tmp_path / "run", config).restore_variables(0)
    assert_same_tree(restored["params"], load_pretrained(source)[1]["params"])
    convert(tmp_path / "run", tmp_path / "wide", dtype="float32")
    assert_same_tree(load_pretrained(tmp_path / "wide")[1], load_pretrained(source)[1])


def test_some_in_other_dtypes(tmp_path, plain):
    """A bias cut down with the rest, a router kept in float32 whose digits bfloat16 has not."""

    def change(arrays):
        arrays[f"model.layers.1.{BIAS}"] = arrays[f"model.layers.1.{BIAS}"].astype(ml_dtypes.bfloat16)
        arrays["model.layers.1.mlp.gate.weight"] = arrays["model.layers.1.mlp.gate.weight"].astype(np.float32) + 1e-6
        arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float16)

    source = rewritten(plain("bfloat16"), tmp_path / "source", change)
    assert_same_tensors(there_and_back(source, tmp_path), SafetensorsDirectory(source))


@pytest.mark.parametrize("dtype", ["F32", "F8_E8M0"])
def test_scales_that_are_powers_of_two(dtype, tmp_path, plain):
    """scale_fmt says so, and stays."""
    kind = {"F32": np.float32, "F8_E8M0": ml_dtypes.float8_e8m0fnu}[dtype]

    def change(arrays):
        for name in arrays:
            if name.endswith("_scale_inv"):
                arrays[name] = np.exp2(np.ceil(np.log2(arrays[name]))).astype(kind)

    changed = rewritten(plain("fp8"), tmp_path / "changed", change)
    quantization = json.loads((changed / "config.json").read_text())["quantization_config"] | {"scale_fmt": "ue8m0"}
    source = with_config(changed, tmp_path / "source", quantization_config=quantization)
    assert_same_tensors(there_and_back(source, tmp_path), SafetensorsDirectory(source))
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    convert(tmp_path / "run", tmp_path / "narrow", dtype="bfloat16")
    assert "quantization_config" not in json.loads((tmp_path / "narrow" / "config.json").read_text())


def test_shards_without_an_index(tmp_path, plain):
    convert(plain("bfloat16"), tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "source", max_shard_size="100KB")
    (tmp_path / "source" / INDEX_FILE).unlink()
    assert_same_tensors(there_and_back(tmp_path / "source", tmp_path), SafetensorsDirectory(tmp_path / "source"))
    last = sorted((tmp_path / "source").glob("*.safetensors"))[-1]
    last.rename(tmp_path / "source" / "model-00001-of-00001.safetensors")
    with fails("several models", "remove the stale ones"):
        load_pretrained(tmp_path / "source")
    (tmp_path / "source" / "model-00001-of-00001.safetensors").unlink()
    with fails("holds 3 of the 4 shards", "no index"):
        load_pretrained(tmp_path / "source")


def test_a_language_model_within_another(tmp_path, plain, capsys):
    """And buffers that older conversions carry; only the language model's own weights come."""

    def change(arrays):
        for name in list(arrays):
            arrays[f"language_model.{name}"] = arrays.pop(name)
        arrays["vision_tower.patch_embed.weight"] = np.zeros((2, 3), np.float32)
        arrays["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    source = rewritten(plain("bfloat16"), tmp_path / "source", change)
    text = json.loads((source / "config.json").read_text()) | {"model_type": "kimi_k2"}
    nested = {"model_type": "kimi_vl", "dtype": text.pop("dtype"), "eos_token_id": 7, "text_config": text}
    (source / "config.json").write_text(json.dumps(nested))
    assert_same_tensors(there_and_back(source, tmp_path), SafetensorsDirectory(plain("bfloat16")))
    said = capsys.readouterr().out
    assert "1 tensors of other parts are left out: vision_tower" in said and "1 inv_freq buffers are left out" in said
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert content["model_type"] == "kimi_k2" and "text_config" not in content and content["dtype"] == "bfloat16"


def test_a_tied_head_that_is_there_all_the_same(tmp_path):
    source = write_huggingface_directory(tmp_path / "plain", dataclasses.replace(SMALL, tie_word_embeddings=True))

    def change(arrays, by=0):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + np.float32(by)

    changed = rewritten(source, tmp_path / "changed", change)
    assert_same_tensors(there_and_back(changed, tmp_path), SafetensorsDirectory(changed), but=["lm_head.weight"])
    other = rewritten(source, tmp_path / "other", lambda arrays: change(arrays, 1))
    for load in (load_pretrained, load_torch):
        with fails("lm_head.weight", "is not equal to model.embed_tokens.weight, though tie_word_embeddings is true"):
            load(other)


@pytest.mark.parametrize(("said", "found"), [(0, 1), (1, 0), (3, 1)])
def test_mtp_layers_are_those_of_the_files(said, found, tmp_path, plain, capsys):
    def change(arrays):
        for name in [name for name in arrays if name.startswith(MTP) and not found]:
            del arrays[name]

    source = with_config(
        rewritten(plain("float32"), tmp_path / "s", change), tmp_path / "source", num_nextn_predict_layers=said
    )
    assert_same_tensors(there_and_back(source, tmp_path), SafetensorsDirectory(source))
    assert f"num_nextn_predict_layers is {said}" in capsys.readouterr().out
    assert load_config(tmp_path / "run" / "config.yaml").model.num_nextn_predict_layers == found


def test_keys_that_nobody_knows_are_told(tmp_path, plain, capsys):
    source = with_config(plain("float32"), tmp_path / "source", rotary_dim=32, sliding_window=None)
    convert(source, tmp_path / "run", dry_run=True)
    assert "keys that are not known here and change nothing: rotary_dim\n" in capsys.readouterr().out


class TestFilesOfTorch:
    """What `torch.save` wrote."""

    @pytest.fixture(scope="class")
    def tensors(self, plain):
        """By the sibling's names and the copies."""
        directory = SafetensorsDirectory(plain("bfloat16"))
        return {
            name: torch.from_numpy(directory.read(name).view(np.uint8)).view(
                torch.float32 if entry.dtype == "F32" else torch.bfloat16
            ).reshape(entry.shape)
            for name, entry in directory.entries.items()
        }  # fmt: skip

    @pytest.mark.parametrize("layout", ["single", "indexed", "shards alone"])
    def test_they_are_read(self, layout, tensors, plain, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        shutil.copyfile(plain("bfloat16") / "config.json", source / "config.json")
        names = list(tensors)
        parts = [names] if layout == "single" else [names[::2], names[1::2]]
        files = ["pytorch_model.bin"] if layout == "single" else [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
        for file, part in zip(files, parts):
            torch.save(
                {name: tensors[name].T.contiguous().T if "o_proj" in name else tensors[name] for name in part}, source / file
            )
        if layout == "indexed":
            weight_map = {name: file for file, part in zip(files, parts) for name in part}
            (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert_same_tensors(there_and_back(source, tmp_path), SafetensorsDirectory(plain("bfloat16")))
        assert not (source / SINGLE_FILE).exists()

    def test_what_is_no_mapping_of_tensors_is_refused(self, tensors, plain, tmp_path):
        shutil.copyfile(plain("bfloat16") / "config.json", tmp_path / "config.json")
        file = tmp_path / "pytorch_model.bin"
        for content, words in (
            ({"model": dict(tensors)}, "model: a dict; only names and their tensors"),
            ([1], "holds a list"),
            ({"x": np.random.default_rng(0)}, "torch cannot load it"),
            ({"model.norm.weight": torch.zeros(3, dtype=torch.complex64)}, "dtype complex64"),
        ):
            torch.save(content, file)
            with fails(str(file), words):
                convert(tmp_path, tmp_path / "run")
        file.write_bytes(file.read_bytes()[:100])
        with fails(str(file), "torch cannot load it"):
            load_torch(tmp_path)
