"""What preparing data did, as report.json and a page of plots."""

import json
from pathlib import Path
from typing import Any

import numpy as np

REPORT, PLOTS, DROPPED = "report.json", "report.png", "dropped.jsonl"


def write_report(directory: Path, report: dict[str, Any], samples: list[dict[str, Any]], lengths: np.ndarray) -> None:
    """Write report.json, dropped.jsonl (samples of what was dropped) and report.png.

    Args:
        lengths: tokens of each document that stayed.
    """
    (directory / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (directory / DROPPED).write_text("".join(lines), encoding="utf-8", errors="replace")
    _plot(directory / PLOTS, report, lengths)


def _plot(path: Path, report: dict[str, Any], lengths: np.ndarray) -> None:
    from matplotlib.figure import Figure  # here, for it takes a second

    figure = Figure(figsize=(11, 8), layout="constrained")
    stages, reasons, mix, sizes = figure.subplots(2, 2).flat
    documents = report["documents"]
    stages.bar(list(documents), list(documents.values()), color="tab:blue")
    stages.set_title("documents after each stage")
    why = report["dropped"] | {f"input: {reason}": count for reason, count in report["faults"]["reasons"].items()}
    top = sorted(why.items(), key=lambda item: item[1])[-12:]
    reasons.barh([name for name, _ in top], [count for _, count in top], color="tab:red")
    reasons.set_title("dropped, by reason")
    domains = report["domains"]
    places = np.arange(len(domains))
    for offset, key, label in ((-0.3, "share_in", "before"), (0, "asked", "asked"), (0.3, "share", "after")):
        mix.bar(places + offset, [domain[key] for domain in domains.values()], 0.28, label=label)
    named = [f"{name}\nread {domain['repetition']:.2f} times" for name, domain in domains.items()]
    mix.set_xticks(places, named, fontsize=8)
    mix.set_title("share of tokens by domain")
    mix.legend(frameon=False)
    if len(lengths):
        sizes.hist(np.log10(np.maximum(lengths, 1)), bins=40, color="tab:green")
    sizes.set_title("tokens of a document, powers of ten")
    figure.savefig(path, dpi=110)
