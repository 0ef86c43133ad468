"""Attention of the next tokens of a text to themselves and to a cache of those before, for reading it a part at a time.

Keys and values exist for one part at a time, and scores for blocks of it, so that what a text of any length needs beside its
cache is what a part needs: of T tokens T H (qk_nope_head_dim + qk_rope_head_dim + v_head_dim) numbers, 168 MB in DeepSeek-V3
for 2048 of them in bfloat16. What comes before is expanded again for every part: with parts that long a fifth more work
than attention alone, where attention in the latent space, as for single tokens, would be 3.4 times as much.
"""

from collections.abc import Callable

import jax

from deepseek_jax.model.chunked_attention import attend, merged

Latents = tuple[jax.Array, jax.Array]


def prefix_attention(
    expand: Callable[[Latents], tuple[jax.Array, jax.Array]], scale: float, q: jax.Array, latents: Latents, cache: Latents,
    start: jax.Array,
) -> jax.Array:  # fmt: skip
    """Attend; no gradient flows back.

    Args:
        expand: latents [B, T, ...] -> keys and values [B, T, H, ...].
        scale: factor on the scores.
        q: [B, T, H, D].
        latents: of the same tokens.
        cache: latents [B, S, ...] of those before.
        start: how many there are, a multiple of T.

    Returns:
        [B, T, H, V].
    """
    q, size = q.swapaxes(1, 2), q.shape[1]

    def to_part(latents: Latents, causal: bool) -> tuple[jax.Array, jax.Array]:
        k, v = (x.swapaxes(1, 2) for x in expand(latents))
        return attend(q, k, v, None, scale, causal)

    def one_more(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=1), cache)
        return merged(found, to_part(part, causal=False))

    out, normalizer = to_part(latents, causal=True)
    out, _ = jax.lax.fori_loop(0, start // size, one_more, (out.astype(normalizer.dtype), normalizer))
    return out.astype(q.dtype).swapaxes(1, 2)
