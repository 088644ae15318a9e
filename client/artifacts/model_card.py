"""The model card of an exported model: what it is, where it comes from, and how stock code loads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from ...common.models.sources import stock_name

if TYPE_CHECKING:
    from .exported_adapter import ExportedAdapter


CLASSES = {"classification": "AutoModelForSequenceClassification", "generation": "AutoModelForCausalLM"}
PARTS = {
    "all": "the personalised model: shared adapter, the site's core and its private adapter",
    "shared": "the shared adapter alone, which is the same for every site",
    "personal": "what the site adds to the shared adapter",
}
LOADED = {
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
    """A README.md with the hub's front matter. Of a shared adapter it names no site and nothing of one."""
    plan, about = exported.saved.plan, exported.saved.metadata
    personal = exported.part != "shared"
    front = {
        "base_model": stock_name(plan.model),
        "library_name": "transformers" if merged else "peft",
        "tags": ["colora", "lora"],
    }
    what = ", merged into the base model" if merged else f", as one LoRA of rank {exported.rank}"
    facts = {
        "what": PARTS[exported.part] + what,
        "base model": plan.model.source + (f" ({plan.model.revision})" if plan.model.revision else ""),
        "its precision in training": plan.model.precision,
        "its fingerprint": "; ".join(f"{name} {value}" for name, value in sorted(about.fingerprint.items()) if value),
        "federation": f"{about.federation}, after round {min(about.round, plan.rounds)} of {plan.rounds}",
        "moved": f"from {plan.transfer.source_federation}'s base model, by texts that a model wrote"
        if plan.transfer.source_federation
        else "",
        "site": about.site if personal else "",
        "method": plan.method.name + (f", private adapter: {plan.private.kind}" if personal else ""),
        "task": about.task + ("" if exported.complete else "; without a head, which is each site's own"),
        "longest text in training": f"{plan.model.max_length} tokens",
        "metrics on the site's test data": _metrics(exported) if personal else "",
    }
    lines = [f"- **{name}**: {value}" for name, value in facts.items() if value]
    title = f"{about.federation} {about.site if personal else 'shared'}".strip()
    header = yaml.safe_dump(front, sort_keys=False)
    return f"---\n{header}---\n\n# {title}\n\n" + "\n".join(lines) + f"\n\n{_usage(exported, merged=merged)}"


def _metrics(exported: ExportedAdapter) -> str:
    """Of the personalised model, which the last round measures as it is."""
    if not exported.saved.closed:
        return ""
    found = {name: value for name, value in exported.saved.metadata.metrics.items() if name.startswith("personal.")}
    return ", ".join(f"{name.removeprefix('personal.')} {value:.4g}" for name, value in sorted(found.items()))


def _usage(exported: ExportedAdapter, *, merged: bool) -> str:
    plan, task = exported.saved.plan, exported.saved.metadata.task
    kind, labels, precision = CLASSES[task], exported.labels, plan.model.precision
    names = [kind, "AutoTokenizer"] + (["BitsAndBytesConfig"] if precision.startswith("int") else [])
    lines = ["import torch", f"from transformers import {', '.join(sorted(names))}"]
    if merged:
        lines += [f'model = {kind}.from_pretrained("HERE", {LOADED[precision][0]})']
    else:
        more = LOADED[precision] + ([f'revision="{plan.model.revision}"'] if plan.model.revision else [])
        if labels:
            lines += [f"labels = {list(labels)}"]
            more += ["id2label=dict(enumerate(labels))", "label2id={label: i for i, label in enumerate(labels)}"]
        elif _classes(exported):
            more += [f"num_labels={_classes(exported)}"]
        lines += ["from peft import PeftModel"]
        lines += [f'base = {kind}.from_pretrained("{stock_name(plan.model)}", {", ".join(more)})']
        lines += ['model = PeftModel.from_pretrained(base, "HERE")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("HERE")']
    if task == "classification" and not merged:
        lines += ["model.config.pad_token_id = tokenizer.pad_token_id"]
    told = "HERE is this folder."
    if not merged and labels:
        told += " That the classifier's weights are newly initialised is said before the adapter brings them."
    return "```python\n" + "\n".join(lines) + f"\n```\n\n{told}\n"


def _classes(exported: ExportedAdapter) -> int:
    """The number of classes of a head that is part of the export; 0 for none."""
    heads = [v for k, v in exported.tensors.items() if k.partition(".")[0] in exported.modules and k.endswith("weight")]
    return heads[-1].shape[0] if heads and exported.saved.metadata.task == "classification" else 0
