"""Low-rank adapters: both siblings learn the same, on any mesh, and what is exported is what was learnt."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from deepseek_jax.checkpoint.adapters import adapter_layout, with_adapters_merged
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.config import Config, ConfigError, LoraConfig, ParallelConfig, Phase, TrainConfig, load_config, to_yaml
from deepseek_jax.config.trainable import trainable, with_part
from deepseek_jax.convert import convert, export_adapter
from deepseek_jax.data.marks import COUNTED, ENDS
from deepseek_jax.model.layers import Linear
from deepseek_jax.parallel.mesh import make_mesh, resolve
from deepseek_jax.parallel.sharding import Division, place_batch
from deepseek_jax.planning.figures import checkpoint_bytes
from deepseek_jax.training.adapters import scaled
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.loading import load_model
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.schedules import Position
from deepseek_jax.training.step import Scalars, TrainState, init_state, train_step
from deepseek_torch.model.layers import Linear as TorchLinear
from deepseek_torch.model.transformer import DeepseekV3 as TorchModel
from deepseek_torch.pretrained import load_pretrained as load_torch
from deepseek_torch.pretrained import save_pretrained as save_torch
from deepseek_torch.training.adapters import add_adapters
from deepseek_torch.training.schedules import plan_steps
from deepseek_torch.training.step import init_state as init_torch_state
from deepseek_torch.training.step import train_step as torch_train_step
from parity_tests.checkpoints import TINY, random_variables, write_huggingface_directory
from parity_tests.comparison import assert_close, difference
from parity_tests.modules import COMPILE_QUICKLY
from parity_tests.siblings import Siblings
from parity_tests.transformers_oracle import float64_islands
from parity_tests.weights import to_torch

LORA = LoraConfig(rank=3, alpha=5.0, modules=["self_attn.*", "mlp.down_proj", "shared_experts.*", "mlp.experts.*"])
SMALL = dataclasses.replace(TINY, num_hidden_layers=3, first_k_dense_replace=1)


def config_with(steps: int = 3, lora: LoraConfig = LORA, precision: str = "float64", **train) -> Config:
    """Attention, a dense layer and shared experts have adapters; the head and MTP modules' projections learn beside them."""
    model = dataclasses.replace(SMALL, precision=precision, grouped_matmul="reference", remat="none")
    learning = TrainConfig(
        steps=steps, sequence_length=12, batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2, gradient_clip=0.5,
        bias_update_speed=[Phase(1e-2)], trainable=["lm_head/*", "mtp_layers/eh_proj/*"], loss_chunk_tokens=20, **train,
    )  # fmt: skip
    return dataclasses.replace(load_config("tiny"), model=model, train=learning, lora=lora)


def adapters_of(state_dict, config: Config) -> dict:
    """The sibling's adapters as a tree of the JAX model's parameters."""
    arrays: dict[tuple[str, ...], dict] = {}
    for place in adapter_layout(config.model, config.lora):
        arrays.setdefault(place.path[1:], {})[place.index] = state_dict[place.name].detach().numpy().T
    tree: dict = {}
    for path, parts in arrays.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        stacked = np.stack([parts[index] for index in sorted(parts)])
        node[path[-1]] = stacked.reshape(*(number + 1 for number in max(parts)), *stacked.shape[1:])
    return tree


def adapters_to_torch(params, config: Config) -> dict[str, np.ndarray]:
    """The JAX model's adapters by the sibling's names."""
    flat = flatten_dict(params)
    return {p.name: np.asarray(flat[p.path[1:]])[p.index].T for p in adapter_layout(config.model, config.lora)}


def randomised(model: TorchModel) -> None:
    """Adapters that change something, as after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def conversations(config: Config, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Tokens of which some count and some end a conversation; see `data.marks`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    return tokens | COUNTED * (rng.random(shape) < 0.4) | ENDS * (rng.random(shape) < 0.15)


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_both_siblings_learn_the_same(steps):
    """Of conversations, in which the assistant's tokens count."""
    config = config_with(steps)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, format="chat"))
    pair = Siblings(config.model)
    base = {name: tensor.clone() for name, tensor in pair.torch.state_dict().items()}
    in_torch = init_torch_state(config, pair.torch)
    randomised(pair.torch)
    start = adapters_of(pair.torch.state_dict(), config)
    with jax.enable_x64(True):
        in_jax = jax.jit(partial(init_state, config), compiler_options=COMPILE_QUICKLY)(pair.variables)
        assert flatten_dict(in_jax.params).keys() == flatten_dict(with_part(pair.variables["params"], start)).keys()
        assert not any(leaf.any() for path, leaf in flatten_dict(in_jax.params).items() if path[-1] == "lora_B")
        in_jax = in_jax._replace(params=with_part(in_jax.params, start))
        step = jax.jit(partial(train_step, config=config), compiler_options=COMPILE_QUICKLY)
        for plan in plan_steps(config.train):
            tokens = conversations(config, plan.step, (2, 2, 14))
            scalars = Scalars(*map(jnp.float64, (plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight)))
            in_jax, ours = step(in_jax, tokens, scalars)
            theirs = torch_train_step(in_torch, torch.from_numpy(tokens).long(), plan, config)
            tolerance = 1e-12 if plan.step == 1 else 1e-10
            parts = "cross_entropy", "balance_loss"
            told, also = (
                {"loss": m.loss, "grad_norm": m.grad_norm} | {n: getattr(m.parts, n) for n in parts} for m in (ours, theirs)
            )
            assert_close(told, also, tolerance)
            variables = {"params": in_jax.params, "router_state": in_jax.router_state}
            found = to_torch(variables, config.model) | adapters_to_torch(in_jax.params, config)
            assert_close(found, in_torch.model.state_dict(), tolerance)
    kept = [name for name in base if "lm_head" not in name and "eh_proj" not in name and "correction_bias" not in name]
    assert all(torch.equal(base[name], in_torch.model.state_dict()[name]) for name in kept)
    moved = adapters_of(in_torch.model.state_dict(), config)
    assert all((new != flatten_dict(start)[path]).any() for path, new in flatten_dict(moved).items())


MESHES = [dict(data=2, expert=2), dict(pipe=2, fsdp=2, data=2), dict(context=2, fsdp=2)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items()))
def test_a_step_is_that_of_one_device(mesh):
    config = dataclasses.replace(config_with(), parallel=ParallelConfig(**{"data": 1} | mesh))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="products"))
    devices = int(np.prod(list(mesh.values())))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=16))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, format="chat"))
    tokens = conversations(config, 0, (2, 8, 14))
    with jax.enable_x64(True):
        state = jax.device_get(jax.jit(partial(init_state, config))())
        rng = np.random.default_rng(1)
        b = {path: 0.1 * rng.standard_normal(leaf.shape) for path, leaf in flatten_dict(state.params).items()
             if path[-1] == "lora_B"}  # fmt: skip
        for path, leaf in b.items():
            state = state._replace(params=with_part(state.params, _nested(path, leaf)))
        scalars = Scalars(*map(np.float64, (1e-2, 1e-2, 0.3)))
        alone = jax.jit(partial(train_step, config=config))(state, tokens, scalars)
        parallel = resolve(config, devices)
        division = Division(parallel, state.params, make_mesh(parallel, jax.devices()[:devices]))
        placed = jax.device_put(state, division.shardings(state, make_optimizer(config.train), trainable(config)))
        batch = place_batch(division, tokens.shape, 1, lambda start, end: tokens[:, start:end])
        together = jax.jit(partial(train_step, config=config, division=division))(placed, batch, scalars)
    apart = jax.tree.map(lambda a, b: difference(a, b).relative, jax.device_get(together), jax.device_get(alone))
    assert max(jax.tree.leaves(apart)) < 1e-10


def _nested(path, leaf):
    return {path[0]: _nested(path[1:], leaf)} if path else leaf


def test_moments_are_those_of_what_learns():
    """Neither gradients nor moments of the base are there, and a plan counts so."""
    config = config_with(precision="float32")
    state = jax.eval_shape(partial(init_state, config))
    learnt = sum(leaf.size for path, leaf in flatten_dict(state.params).items()
                 if "lora_" in path[-1] or path[0] == "lm_head" or "eh_proj" in path)  # fmt: skip
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) == 2 * learnt + 1
    assert learnt < 0.25 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert checkpoint_bytes(config)["training state"] == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_in_fp8_an_adapter_is_in_bfloat16():
    """What it adds is x A B of activations that are not rounded to float8, in both siblings, and its gradients are so too."""
    config = config_with(precision="fp8").model
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((6, 130), np.float32), rng.standard_normal((130, 40), np.float32)
    a, b = rng.standard_normal((130, 4), np.float32), rng.standard_normal((4, 40), np.float32)
    linear = TorchLinear(config, 130, 40)
    linear.weight, linear.lora_A, linear.lora_B = (torch.nn.Parameter(torch.from_numpy(m.T.copy())) for m in (w, a, b))
    theirs = linear(torch.from_numpy(x).bfloat16())
    theirs.float().square().sum().backward()

    def total(params):
        y = Linear(config, 130, 40).apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
        return jnp.sum(jnp.square(y.astype(jnp.float32))), y

    with_gradients = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=COMPILE_QUICKLY)
    (_, ours), gradients = with_gradients({"weight": w, "lora_A": a, "lora_B": b})
    bare = with_gradients({"weight": w, "lora_A": a, "lora_B": 0 * b})[0][1]
    exact = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) @ a @ b
    assert difference(np.asarray(ours - bare, np.float32), exact).relative < 2e-2
    assert difference(np.asarray(ours, np.float32), theirs.detach().float()).relative < 1e-2
    for name in ("lora_A", "lora_B"):
        assert difference(gradients[name].T, getattr(linear, name).grad).relative < 2e-2


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base in Hugging Face's form, and a run of adapters on it: (base, run, config)."""
    folder = tmp_path_factory.mktemp("adapted")
    base = write_huggingface_directory(folder / "base", SMALL)
    train = TrainConfig(sequence_length=16, bias_update_speed=[Phase(0.0)])
    config = Config(model=SMALL, train=train, lora=LORA, run_dir=str(folder / "run"), init_from=str(base))
    state = jax.jit(partial(init_state, config))(random_variables(SMALL))
    rng = np.random.default_rng(2)
    params = state.params
    for path, leaf in flatten_dict(params).items():
        if path[-1] == "lora_B":
            params = with_part(params, _nested(path, rng.standard_normal(leaf.shape, np.float32)))
    checkpoints = Checkpoints(folder / "run", config)
    checkpoints.save(Position(5, 10, 160), TrainState(params, state.router_state, state.optimizer))
    checkpoints.wait()
    (folder / "run/config.yaml").write_text(to_yaml(config))
    return base, folder / "run", config, params


def test_a_checkpoint_is_restored_with_its_adapters(adapted):
    _, run, config, params = adapted
    restored = Checkpoints(run, config).restore(5)
    jax.tree.map(np.testing.assert_array_equal, restored.params, params)
    loaded = load_model(run).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, loaded, with_adapters_merged(jax.device_get(params), LORA))
    fresh = Checkpoints(run, dataclasses.replace(config, lora=LoraConfig()))
    assert flatten_dict(fresh.restore_variables(5)["params"]).keys() == flatten_dict(loaded).keys()


def test_exports_are_what_was_learnt(adapted, tmp_path, monkeypatch):
    """Merged, transformers computes what the sibling does with adapters beside the weights; and so does peft on the base."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    pattern = rf"model\.layers\.{SMALL.num_hidden_layers}.*"
    monkeypatch.setattr(transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [pattern])
    base, run, config, params = adapted
    convert(run, tmp_path / "merged", verify=True)
    export_adapter(run, tmp_path / "adapter")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 15)))
    sibling = TorchModel(dataclasses.replace(SMALL, precision="float64"))
    sibling.load_state_dict(load_torch(base).state_dict())
    with torch.no_grad():
        plain = sibling.hidden_states(tokens) @ sibling.head()
    add_adapters(dataclasses.replace(config, model=sibling.config), sibling)
    state = {name: torch.from_numpy(np.array(array)) for name, array in adapters_to_torch(params, config).items()}
    sibling.load_state_dict(state, strict=False)
    with torch.no_grad(), float64_islands():
        expected = sibling.hidden_states(tokens) @ sibling.head()
        assert difference(plain, expected).relative > 1e-2, "adapters are to matter"
        whole = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", dtype=torch.float64, experts_implementation="eager"
        )
        assert difference(whole(tokens).logits, expected).relative < 1e-5, "but for weights rounded to float32"
        under = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, experts_implementation="eager")
        with_adapter = peft.PeftModel.from_pretrained(under, tmp_path / "adapter").double()
        assert difference(with_adapter(tokens).logits, expected).relative < 1e-10
    content = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(base) and content["r"] == 3
    names = {name for name, _ in with_adapter.named_parameters() if "lora_" in name}
    assert len(names) == 2 * (3 * 5 + 1 + 2 * 3) + 2 * 2 * 2, "attention, a dense layer, two of shared and of routed experts"
    assert len(content["target_modules"]) == 3 * 5 + 3 and len(content["target_parameters"]) == 1 + 2 * 3
    save_torch(tmp_path / "from-torch", sibling)
    theirs, ours = (flatten_dict(load_pretrained(tmp_path / name)[1]["params"]) for name in ("from-torch", "merged"))
    for path, weight in ours.items():
        np.testing.assert_allclose(theirs[path], weight, rtol=0, atol=1e-6 * np.abs(weight).max())


def test_b_is_scaled_once():
    params = {"moe_layers": {"q": {"weight": np.ones(2), "lora_A": np.ones(2), "lora_B": np.ones(2)}}}
    found = scaled(params, LORA)["moe_layers"]["q"]
    assert [float(found[name][0]) for name in ("weight", "lora_A", "lora_B")] == [1, 1, 5 / 3]
    assert scaled(params, LoraConfig()) is params


@pytest.mark.parametrize(("modules", "told"), [
    (["q_proj"], r"lora.modules=q_proj: no Linear .*choose of self_attn.q_a_proj, self_attn.q_b_proj"),
    (["self_attn.*", "lm_head"], r"lora.modules=lm_head: no Linear"),
    (["mlp.expert.*"], r"lora.modules=mlp.expert.\*: no Linear .*, mlp.experts.\*.gate_proj, mlp.experts.\*.up_proj"),
    (["experts.*.down_proj"], r"down_proj is chosen and .*experts.0.gate_proj is not; peft takes routed experts whole"),
    (["experts.1.*"], r"experts.1.* is chosen and .*experts.0.gate_proj is not; peft"),
    (["model.layers.1.self_attn.o_proj"], r"layers.1.self_attn.o_proj is chosen and model.layers.2.self_attn.o_proj is not"),
])  # fmt: skip
def test_names_of_nothing_are_refused(modules, told):
    with pytest.raises(ConfigError, match=told):
        adapter_layout(SMALL, LoraConfig(rank=1, modules=modules))


@pytest.mark.parametrize("other", ["train.optimizer=muon", "train.qk_clip=100", "train.ema_decay=0.9", "lora.alpha=0"])
def test_what_does_not_go_with_adapters_is_refused(other):
    with pytest.raises(ConfigError, match=r"^lora\.(rank=2|alpha=0.0): "):
        load_config("tiny", ["lora.rank=2", other])


def test_what_no_adapter_can_carry_is_refused(adapted, tmp_path):
    base, run, *_ = adapted
    with pytest.raises(CheckpointError, match=r"base: is a Hugging Face directory; an adapter comes from a run"):
        export_adapter(base, tmp_path / "out")
    meta = run / "checkpoints/5/meta/metadata"
    kept = meta.read_text()
    try:
        for change, told in (
            ({"train": {"bias_update_speed": [{"to": 0.001}]}}, "the routers' biases moved"),
            ({"train": {"trainable": ["lm_head/*"]}}, "weights of the model itself learnt"),
            ({"lora": {"rank": 0}}, "trained without lora.rank"),
            ({"lora": {"rank": 2}}, r"of the wrong shape: dense_layers"),
            ({"lora": {"rank": "many"}}, r"metadata: lora: lora.rank is 'many'"),
        ):
            meta.write_text(json.dumps(json.loads(kept) | change))
            with pytest.raises(CheckpointError, match=told):
                export_adapter(run, tmp_path / "out")
    finally:
        meta.write_text(kept)
    assert not Path(tmp_path / "out").exists()
