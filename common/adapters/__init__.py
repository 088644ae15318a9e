"""Adapter forms on PEFT's LoRA layers: attachment, initial values, and ΔW as two factors."""
