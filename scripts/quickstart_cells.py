# %% [markdown]
# # A DeepSeek-V3 of one's own, in Python
# Run it cell by cell in an editor or notebook that knows `# %%`, or as a whole:
#
#     scripts/python scripts/quickstart_cells.py
#
# `from deepseek_torch import DeepSeekModel, DeepSeekTrainer` does the same in PyTorch.

# %% Text: anything that gives strings. Here, some of Python's own modules.
import importlib
import inspect
import os

names = ["textwrap", "argparse", "ast", "calendar", "csv", "datetime", "functools", "json", "logging", "random", "typing"]
if "QUICK" in os.environ:  # to see that it works
    names = names[:1]
texts = [inspect.getsource(importlib.import_module(name)) for name in names]

# %% A model, from sizes or a preset's name; what is not given follows from what is.
from deepseek_jax import DeepSeekModel, DeepSeekTrainer

model = DeepSeekModel(
    vocab_size=1024,
    hidden_size=96,
    num_attention_heads=4,
    num_hidden_layers=2,
    kv_lora_rank=32,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
)
print(model.count_parameters())

# %% Training. Without `tokenizer=` one is trained on the texts; transformers' AutoTokenizer or a tokenizer.json do as well.
# `precision="fp8"` trains in block-scaled float8: right anywhere, and fast where the hardware has it.
trainer = DeepSeekTrainer(model, learning_rate=4e-3)
history = trainer.train(texts, epochs=1, batch_size=8, max_length=128)
history  # in a notebook, the picture of the loss  # noqa: B018

# %% Writing
prompt = model.tokenizer.encode("def ").ids
print(model.tokenizer.decode(model.generate(prompt, max_new_tokens=60, temperature=0.8)))

# %% Keeping it, as an ordinary Hugging Face directory
model.save_pretrained(history.run_dir / "huggingface")
same = DeepSeekModel.from_pretrained(history.run_dir / "huggingface")
assert same.generate(prompt, max_new_tokens=60) == model.generate(prompt, max_new_tokens=60)
print(history)
