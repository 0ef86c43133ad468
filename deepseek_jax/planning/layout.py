"""Where a TPU's compiler lays a program's temporaries, from the report that it writes of it.

`memory_analysis` counts too much on TPUs: 75.8 GB for a step of MaxText that lies in 52.8 (3 layers of DeepSeek-V3's
widths, expert 8 on v5p), and with longer sequences 126 of the 103 GB that a chip has, for a program that is not refused.
"""

import re
from pathlib import Path
from typing import Optional

TEMPORARIES = re.compile(r"^allocation \d+: size (\d+),(?: page \d+,)? preallocated-temp:", re.MULTILINE)


def reporting(platform: str, folder: str) -> dict[str, str | bool]:
    """Options by which a compiler writes its report into a folder; none where `memory_analysis` is right."""
    return {"xla_dump_to": folder} if platform == "tpu" else {}


def temporary_bytes(folder: str) -> Optional[int]:
    """Of the program whose report is there; null if there is none."""
    reports = [path.read_text(encoding="utf-8", errors="replace") for path in Path(folder).glob("*buffer-assignment.txt")]
    return max((int(size) for report in reports for size in TEMPORARIES.findall(report)), default=None)
