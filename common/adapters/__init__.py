"""The adapter's mathematics on PEFT's LoRA layers."""
