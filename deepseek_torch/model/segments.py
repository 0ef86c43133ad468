"""Documents that follow each other in one sequence, kept apart (`data.mask_documents`)."""

import torch


def segments(ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which document of its sequence each token is of, and its place in it.

    Args:
        ends: [B, T] booleans, whether it is its document's last.

    Returns:
        Numbers of documents and positions that start anew with each, both [B, T].
    """
    numbers, positions = torch.zeros_like(ends, dtype=torch.long), torch.zeros_like(ends, dtype=torch.long)
    for i in range(1, ends.shape[1]):
        ended = ends[:, i - 1]
        numbers[:, i] = numbers[:, i - 1] + ended
        positions[:, i] = torch.where(ended, 0, positions[:, i - 1] + 1)
    return numbers, positions
