"""What is trained: language modeling, and classification of texts."""
