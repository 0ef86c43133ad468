"""Kernels for machines that are not here, interpreted."""

from deepseek_jax.kernels import splash_attention


def emulate_splash(monkeypatch):
    """Splash attention without a TPU."""
    kernel = splash_attention.SplashAttentionKernel
    monkeypatch.setattr(
        splash_attention, "SplashAttentionKernel", lambda *masks, **settings: kernel(*masks, **settings | {"interpret": True})
    )
