"""The GPT in Flax NNX: modules, fused operations, loss, sampling."""
