"""An OpenAI-compatible endpoint over one model: continuous batching on the native loop, text streamed as it comes."""
