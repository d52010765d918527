"""BEiT: BERT pre-training of image Transformers."""
