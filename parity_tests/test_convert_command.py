"""The command: dry runs, verification, and what an interruption leaves."""

import subprocess
import sys

import pytest

import deepseek_jax.convert as conversion
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.convert import convert
from parity_tests.checkpoints import contents, write_huggingface_directory
from parity_tests.conversions import command, fails
from parity_tests.test_stored_forms import SMALL


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


def test_a_tokenizer_that_is_not_read_goes_along(tmp_path, capsys):
    source = write_huggingface_directory(tmp_path / "source", SMALL)
    (source / "tiktoken.model").write_bytes(b"aGk= 0")
    convert(source, tmp_path / "run")
    assert "no tokenizer.json, only tiktoken.model, which goes along; generation" in capsys.readouterr().out
    convert(tmp_path / "run", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


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
