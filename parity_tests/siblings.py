"""The two models as a pair that holds the same weights."""

import torch

import deepseek_jax.model.transformer as jax_transformer
import deepseek_torch.model.transformer as torch_transformer
from deepseek_jax.config import ModelConfig
from parity_tests.weights import from_torch

# Sharing out tensors as small as these costs more than it gives.
torch.set_num_threads(1)


class Siblings:
    """Both models with the same weights, drawn at random: norms off 1 and router biases of either sign, too."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        self.config = config
        torch.manual_seed(seed)
        self.torch = torch_transformer.DeepseekV3(config)
        with torch.no_grad():
            for name, tensor in self.torch.state_dict().items():
                if "norm" in name or name.endswith(".bias"):
                    tensor.add_(torch.randn_like(tensor) * 0.1)
                elif name.endswith("e_score_correction_bias"):
                    tensor.sub_(torch.randn_like(tensor) * 0.1 + 0.5)
        self.jax = jax_transformer.DeepseekV3(config)
        self.variables = from_torch(self.torch.state_dict(), config)
