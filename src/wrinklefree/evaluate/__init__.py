"""Rank 3: how good a model is: perplexity and divergence, benchmarks, quantization error."""
