"""What preparing data did, as report.json and a page of plots."""

import json
from pathlib import Path
from typing import Any

import numpy as np

REPORT, PLOTS, DROPPED = "report.json", "report.png", "dropped.jsonl"


def write_report(
    directory: Path, report: dict[str, Any], samples: list[dict[str, Any]], lengths: dict[str, np.ndarray]
) -> None:
    """Write report.json, dropped.jsonl (samples of what was dropped) and report.png.

    Args:
        lengths: by domain, tokens of each document that stayed.
    """
    (directory / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (directory / DROPPED).write_text("".join(lines), encoding="utf-8", errors="replace")
    _plot(directory / PLOTS, report, lengths)


def quantiles(lengths: np.ndarray) -> dict[str, float]:
    """How long documents are, in tokens; nothing where there are none."""
    if not len(lengths):
        return {}
    names = {"shortest": 0, "10%": 0.1, "median": 0.5, "90%": 0.9, "longest": 1}
    return {name: round(float(np.quantile(lengths, share)), 1) for name, share in names.items()} | {
        "mean": round(float(lengths.mean()), 1)
    }


def _plot(path: Path, report: dict[str, Any], lengths: dict[str, np.ndarray]) -> None:
    from matplotlib.figure import Figure  # here, for it takes a second

    figure = Figure(figsize=(15, 8), layout="constrained")
    stages, reasons, copies, mix, tokens, sizes = figure.subplots(2, 3).flat
    for stage, count in report["documents"].items():
        stages.bar(stage, count, color="tab:blue")
    stages.set_title("documents after each stage")
    why = report["dropped"] | {f"input: {reason}": count for reason, count in report["faults"]["reasons"].items()}
    top = sorted(why.items(), key=lambda item: item[1])[-12:]
    reasons.barh([name for name, _ in top], [count for _, count in top], color="tab:red")
    reasons.set_title("dropped, by reason")
    found = report["duplicates"]
    copies.barh(list(found), list(found.values()), color="tab:orange")
    copies.set_title("copies")
    domains = report["domains"]
    places = np.arange(len(domains))
    for axes, names in ((mix, ("share_in", "asked", "share")), (tokens, ("tokens_before_mixing", "tokens"))):
        for place, name in enumerate(names):
            label = {"asked": "asked", "share": "after", "tokens": "after"}.get(name, "before")
            axes.bar(places + 0.3 * (place - (len(names) - 1) / 2), [own[name] for own in domains.values()], 0.28, label=label)
        axes.legend(frameon=False)
    mix.set_xticks(places, [f"{name}\nread {own['repetition']:.2f} times" for name, own in domains.items()], fontsize=8)
    mix.set_title("share of tokens by domain, mixing")
    tokens.set_xticks(places, [f"{name}\n{own['infilled']:,} infilled" for name, own in domains.items()], fontsize=8)
    tokens.set_title("tokens by domain, mixing")
    for name, own in lengths.items():
        if len(own):
            sizes.hist(np.log10(np.maximum(own, 1)), bins=40, histtype="step", label=name)
            sizes.legend(frameon=False)
    sizes.set_title("tokens of a document, powers of ten")
    figure.savefig(path, dpi=110)
