"""The census: every family of transformers' causal language models, made small, through the whole product."""
