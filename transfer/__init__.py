"""Transfer of an adapter to a new base model without its training data (Trans-LoRA, arXiv 2405.17258)."""
