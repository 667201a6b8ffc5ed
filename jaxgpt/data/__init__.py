"""From a dataset's name to batches: files, readers, corpora, tokenizers, samplers, loaders."""
