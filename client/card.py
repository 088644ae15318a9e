"""The model card of an exported model: what it is, where it comes from, and how stock code loads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from .export import Exported

CLASSES = {"classification": "AutoModelForSequenceClassification", "generation": "AutoModelForCausalLM"}
PARTS = {
    "all": "the personalised model: shared adapter, the site's core and its private adapter",
    "shared": "the shared adapter alone, which is the same for every site",
    "personal": "what the site adds to the shared adapter",
}


def text_of(exported: Exported, *, merged: bool) -> str:
    """A README.md with the hub's front matter."""
    from .export import base_name

    saved, plan = exported.saved, exported.saved.plan
    base, about = base_name(plan), saved.card
    front = {"base_model": base, "library_name": "transformers" if merged else "peft", "tags": ["colora", "lora"]}
    facts = {
        "what": PARTS[exported.part]
        + (", merged into the base model" if merged else f", as one LoRA of rank {exported.rank}"),
        "base model": plan.model.source + (f" ({plan.model.revision})" if plan.model.revision else ""),
        "base model's precision in training": plan.model.precision,
        "fingerprint": "; ".join(f"{name} {value}" for name, value in sorted(about.fingerprint.items()) if value),
        "federation": f"{about.federation}, round {about.round} of {plan.rounds}",
        "site": about.site or "none (a coordinator's checkpoint)",
        "method": f"{plan.method.name}, private adapter: {plan.private.kind}",
        "task": exported.task + (f", labels {', '.join(about.labels)}" if about.labels else ""),
        "metrics on the site's test data": ", ".join(
            f"{name} {value:.4g}" for name, value in sorted(about.metrics.items()) if name.startswith("personal.")
        ),
    }
    lines = [f"- **{name}**: {value}" for name, value in facts.items() if value]
    header = yaml.safe_dump(front, sort_keys=False)
    return (
        f"---\n{header}---\n\n# {about.federation} {about.site}\n\n"
        + "\n".join(lines)
        + f"\n\n{_usage(exported, base, merged)}"
    )


def _usage(exported: Exported, base: str, merged: bool) -> str:
    kind, labels = CLASSES[exported.task], exported.saved.card.labels
    count = f", num_labels={len(labels)}" if labels and not merged and exported.whole else ""
    lines = [f"from transformers import {kind}, AutoTokenizer"]
    if merged:
        lines += [f'model = {kind}.from_pretrained("HERE")']
    else:
        lines += ["from peft import PeftModel", f'base = {kind}.from_pretrained("{base}"{count})']
        lines += ['model = PeftModel.from_pretrained(base, "HERE")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("HERE")']
    names = ""
    if labels:
        names = (
            f"\nClasses in the order of the logits: {', '.join(f'{i} {label}' for i, label in enumerate(labels))}.\n"
        )
    return "```python\n" + "\n".join(lines) + f"\n```\n\nHERE is this folder.\n{names}"
