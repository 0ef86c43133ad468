"""Documents that follow each other in one sequence, kept apart (`data.mask_documents`)."""

import torch


def segments(tokens: torch.Tensor, end_of_document: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which document of its sequence each token is of, and its place in it.

    Args:
        tokens: [B, T] ids; a document's last is `end_of_document`.

    Returns:
        Numbers of documents and positions that start anew with each, both [B, T].
    """
    numbers, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for i in range(1, tokens.shape[1]):
        ended = tokens[:, i - 1] == end_of_document
        numbers[:, i] = numbers[:, i - 1] + ended
        positions[:, i] = torch.where(ended, 0, positions[:, i - 1] + 1)
    return numbers, positions
