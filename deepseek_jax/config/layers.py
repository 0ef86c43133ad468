"""Which layers of the main model are of which kind."""

from deepseek_jax.config.schema import ModelConfig


def has_experts(model: ModelConfig, layer: int) -> bool:
    """Whether the feed-forward of a layer, counted from 0, is a mixture of experts."""
    return layer >= model.first_k_dense_replace and layer % model.moe_layer_freq == 0


def expert_layers(model: ModelConfig) -> int:
    """How many layers of the main model have experts."""
    return sum(has_experts(model, layer) for layer in range(model.num_hidden_layers))


def stretches(model: ModelConfig) -> list[tuple[str, int, int]]:
    """The main model in order, as runs of layers of one kind: name of the stack, first and end within that."""
    runs: list[tuple[str, int, int]] = []
    done = {"dense_layers": 0, "moe_layers": 0}
    for layer in range(model.num_hidden_layers):
        name = "moe_layers" if has_experts(model, layer) else "dense_layers"
        if not runs or runs[-1][0] != name:
            runs.append((name, done[name], done[name]))
        done[name] += 1
        runs[-1] = (name, runs[-1][1], done[name])
    return runs
