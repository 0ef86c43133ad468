"""The picture of a run: training loss and held-out bits per byte over the tokens seen."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.config import TrainConfig
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.schedules import plan_steps

PLOT_FILE, EXPERTS_FILE = "loss.png", "experts.png"
COLUMNS = 400
"""Of a heat map; steps that share one are averaged."""
SCHEDULES = {
    "batch_size": "batch (sequences)",
    "learning_rate": "learning rate",
    "bias_update_speed": "gamma",
    "mtp_loss_weight": "lambda",
}
"""Scheduled numbers of a step, and what they are called in a picture."""


def plot_run(run_dir: Path) -> Path:
    """Draw metrics.jsonl into loss.png in the same directory and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run_dir)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "bits_per_byte" in line]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([s["tokens"] for s in steps], [s["next_token_loss"] for s in steps], lw=0.8, label="next token")
    for depth in range(len(steps[0]["mtp_losses"]) if steps else 0):
        label = f"{depth + 2} tokens ahead"
        axes.plot([s["tokens"] for s in steps], [s["mtp_losses"][depth] for s in steps], lw=0.6, label=label)
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)", title=run_dir.name)
    handles, labels = axes.get_legend_handles_labels()
    if evaluations:
        right = axes.twinx()
        right.plot([e["tokens"] for e in evaluations], [e["bits_per_byte"] for e in evaluations], "k.-", label="held-out")
        names = dict.fromkeys(name for e in evaluations for name in e.get("eval", {}))
        for number, name in enumerate(names):
            of_set = [(e["tokens"], e["eval"][name]) for e in evaluations if name in e.get("eval", {})]
            right.plot(*zip(*of_set), ".--", color=f"C{5 + number}", lw=0.8, label=name)
        right.set_ylabel("bits per byte" if names else "bits per byte, held-out")
        more, their_labels = right.get_legend_handles_labels()
        handles, labels = handles + more, labels + their_labels
    axes.legend(handles, labels)
    axes.grid(alpha=0.3)
    return _save(figure, run_dir / PLOT_FILE)


def plot_experts(run_dir: Path) -> Path | None:
    """Draw how evenly each layer's experts are loaded over the run into experts.png; None of a model without experts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    steps = [line for line in read_metrics(run_dir) if line.get("max_violation")]
    if not steps:
        return None
    groups = np.array_split(np.arange(len(steps)), min(len(steps), COLUMNS))
    violations = np.array([step["max_violation"] for step in steps])
    means = np.array([violations[group].mean(axis=0) for group in groups]).T
    ends = [0, *(steps[group[-1]]["tokens"] for group in groups)]
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.2 * max(len(means), 6)), layout="constrained")
    picture = axes.pcolormesh(ends, np.arange(len(means) + 1) + 0.5, means, cmap="viridis", vmin=0)
    axes.set(xlabel="training tokens", ylabel="layer with experts", title=run_dir.name)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.colorbar(picture, label="MaxVio")
    return _save(figure, run_dir / EXPERTS_FILE)


def plot_schedule(train: TrainConfig, path: Path) -> Path:
    """Draw what changes over the tokens of a whole run (report 4.2) into a PNG file and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plans = list(plan_steps(train))
    figure, panels = pyplot.subplots(len(SCHEDULES), sharex=True, figsize=(8, 8), layout="constrained")
    for axes, (name, label) in zip(panels, SCHEDULES.items()):
        axes.plot([plan.tokens for plan in plans], [getattr(plan, name) for plan in plans], lw=1.2)
        axes.set(ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("training tokens")
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    """Put a whole picture in its place and forget the figure."""
    from matplotlib import pyplot

    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    os.replace(partial, path)
    return path
