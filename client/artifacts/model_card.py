"""The model card of an exported model: its content, its origin, and code that loads it without colora."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import yaml

from ...common.dataset import TASKS
from ...common.foreign_text import markdown
from ...common.models.sources import stock_name

if TYPE_CHECKING:
    from .exported_adapter import ExportedAdapter

PARTS = {
    "all": "the personalized model: the shared adapter with the site's core and private adapter",
    "shared": "the shared adapter, which is the same for all sites",
    "personal": "what the site adds to the shared adapter",
}
LOADING_OPTIONS = {  # by model.precision
    "fp32": ["dtype=torch.float32"],
    "bf16": ["dtype=torch.bfloat16"],
    "fp16": ["dtype=torch.float16"],
    "int8": ["quantization_config=BitsAndBytesConfig(load_in_8bit=True)"],
    "int4": [
        'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        "bnb_4bit_use_double_quant=True)"
    ],
}


def render_model_card(exported: ExportedAdapter, *, merged: bool) -> str:
    """Render a README.md with the hub's front matter; the card of a shared adapter names no site or its data.

    Every text of a recipe, a site or a state file is escaped, in Markdown and in the Python code.
    """
    plan, metadata = exported.saved.plan, exported.saved.metadata
    personal = exported.part != "shared"
    front = {
        "base_model": stock_name(plan.model),
        "library_name": "transformers" if merged else "peft",
        "tags": ["colora", "lora"],
    }
    source = plan.transfer.source_federation
    form = ", merged into the base model" if merged else f", as one LoRA of rank {exported.rank}"
    last = min(metadata.round, plan.rounds)
    facts = {
        "content": PARTS[exported.part] + form,
        "base model": markdown(plan.model.source + (f" ({plan.model.revision})" if plan.model.revision else "")),
        "precision in training": plan.model.precision,
        "fingerprint": "; ".join(
            markdown(f"{name} {value}") for name, value in sorted(metadata.fingerprint.items()) if value
        ),
        "federation": f"{markdown(metadata.federation)}, after round {last} of {plan.rounds}",
        "transferred": f"from the base model of {markdown(source)} with synthetic texts" if source else "",
        "site": markdown(metadata.site) if personal else "",
        "method": plan.method.name + (f", private adapter: {plan.private.kind}" if personal else ""),
        "task": metadata.task + ("" if exported.complete else "; without a head, as each site has its own"),
        "maximum length in training": f"{plan.model.max_length} tokens",
        "metrics on the site's test data": _metrics(exported) if personal else "",
    }
    lines = [f"- **{name}**: {value}" for name, value in facts.items() if value]
    title = markdown(f"{metadata.federation} {metadata.site if personal else 'shared'}".strip())
    header = yaml.safe_dump(front, sort_keys=False)
    return f"---\n{header}---\n\n# {title}\n\n" + "\n".join(lines) + f"\n\n{_usage(exported, merged=merged)}"


def _metrics(exported: ExportedAdapter) -> str:
    """Format the personalized model's metrics, which only the last round measures on the final state."""
    if not exported.saved.closed:
        return ""
    personal = {name: value for name, value in exported.saved.metadata.metrics.items() if name.startswith("personal.")}
    return ", ".join(f"{name.removeprefix('personal.')} {value:.4g}" for name, value in sorted(personal.items()))


def _usage(exported: ExportedAdapter, *, merged: bool) -> str:
    plan, task = exported.saved.plan, TASKS[exported.saved.metadata.task]
    kind, precision = str(task.auto_class), plan.model.precision
    names = [kind, "AutoTokenizer"]
    if merged:
        lines = [f'model = {kind}.from_pretrained("HERE", {LOADING_OPTIONS[precision][0]})']
    else:
        names += ["AutoConfig", *(["BitsAndBytesConfig"] if precision.startswith("int") else [])]
        options = ["config=config", *LOADING_OPTIONS[precision]]
        options += [f"revision={json.dumps(plan.model.revision)}"] if plan.model.revision else []
        options += ["ignore_mismatched_sizes=True"] if task.has_labels else []
        base = f"{kind}.from_pretrained({json.dumps(stock_name(plan.model))}, {', '.join(options)})"
        lines = ['config = AutoConfig.from_pretrained("HERE", subfolder="config")', f"base = {base}"]
        if task.needs_causal_lm:
            names += ["GenerationConfig"]
            lines += ['base.generation_config = GenerationConfig.from_pretrained("HERE", subfolder="config")']
        lines += ['model = PeftModel.from_pretrained(base, "HERE")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("HERE")']
    imports = ["import torch", *([] if merged else ["from peft import PeftModel"])]
    imports += [f"from transformers import {', '.join(sorted(names))}"]
    notes = "HERE is this folder."
    if not merged and exported.labels:
        notes += " Transformers warns that the classifier is newly initialized; the adapter then loads its weights."
    return "```python\n" + "\n".join([*imports, *lines]) + f"\n```\n\n{notes}\n"
