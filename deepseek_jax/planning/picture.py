"""A plan drawn: where a step's time goes, and what fills a device's memory."""

import os
from pathlib import Path

from deepseek_jax.planning.parts import PASSES
from deepseek_jax.planning.report import NAMES, by_part
from deepseek_jax.planning.step import StepFigures

COLORS = {"forward": "#4c78a8", "again": "#f2a93b", "backward": "#7b4fa3"}


def draw(step: StepFigures, title: str, path: Path) -> None:
    """Write a PNG: time by part and pass beside its ideal, and memory by kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time, memory) = plt.subplots(1, 2, figsize=(13, 6), width_ratios=(3, 1), layout="constrained")
    rows = by_part(step.parts)
    labels = [NAMES.get(name, name) for name in rows]
    left = [0.0] * len(rows)
    for of_pass in PASSES:
        widths = [passes[of_pass].seconds * 1e3 if of_pass in passes else 0.0 for passes in rows.values()]
        time.barh(labels, widths, left=left, color=COLORS[of_pass], label=NAMES.get(of_pass, of_pass))
        left = [a + b for a, b in zip(left, widths)]
    waited = sum(transfer.waited_seconds for transfer in step.transfers) * 1e3
    time.barh(["waits for links"], [waited], color="#b0b0b0")
    ideal = [sum(row.ideal_seconds for row in passes.values()) * 1e3 for passes in rows.values()]
    time.scatter(ideal, labels, marker="|", s=220, color="black", label="products at the peak", zorder=3)
    time.invert_yaxis()
    time.set_xlabel(f"ms of a step of {step.seconds * 1e3:,.0f} ms, estimated")
    time.legend(loc="lower right")

    bottom = 0.0
    for name, size in (("arguments", step.argument_bytes), ("temporaries", step.temporary_bytes)):
        memory.bar(["a device"], [size / 1e9], bottom=bottom, label=f"{name}, {size / 1e9:.1f} GB")
        bottom += size / 1e9
    memory.axhline(step.memory_bytes / 1e9, color="black", linestyle="--", label=f"there is {step.memory_bytes / 1e9:.1f} GB")
    memory.set_ylabel("GB")
    memory.legend(loc="lower center")
    figure.suptitle(title)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
    os.replace(partial, path)
