"""stdit: train and sample spatial-temporal diffusion transformers for text-to-video."""

__version__ = "0.1.0"
