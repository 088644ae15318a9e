"""Trans-LoRA (arXiv 2405.17258): an adapter moves to a new base model without the data it was trained on."""
