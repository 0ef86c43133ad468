"""Token vectors from a table whose rows several devices share, without putting it together."""

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.sharding import Division


def look_up(division: Division, rows: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Vectors of this device's tokens; inside `shard_map` over the mesh.

    Every device looks up the tokens of all that share the table with it, and sends each its vectors; their gradients
    come back the same way, and are summed in the rows' own type.

    Args:
        rows: this device's rows of the table, [vocab_size / devices, hidden_size].
        tokens: [B, T] ids.
        dtype: in which vectors travel.

    Returns:
        [B, T, hidden_size].
    """
    axes = tuple(axis for axis in division.layer_axes(("embed_tokens",)) if division.mesh.shape[axis] > 1)
    place = jax.lax.all_gather(tokens, axes, tiled=True) - jax.lax.axis_index(axes) * len(rows)
    is_here = (place >= 0) & (place < len(rows))
    found = jnp.where(is_here[..., None], rows[jnp.where(is_here, place, 0)], 0)
    return jax.lax.psum_scatter(found.astype(dtype), axes, tiled=True)
