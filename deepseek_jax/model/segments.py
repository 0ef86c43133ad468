"""Documents that follow each other in one sequence, kept apart (`data.mask_documents`)."""

import jax
import jax.numpy as jnp


def segments(ends: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which document of its sequence each token is of, and its place in it.

    Args:
        ends: [B, T] booleans, whether it is its document's last.

    Returns:
        Numbers of documents and positions that start anew with each, both int32 [B, T].
    """
    begins = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    places = jnp.arange(ends.shape[1], dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32), places - start
