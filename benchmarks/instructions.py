"""Natural-Instructions subtasks with SmolLM2-135M-Instruct: four similar sites, and four unlike ones. ROUGE-L.

The subtasks are in Big-Bench (``bigbench==1.0.0``, its folder ``benchmark_tasks/natural_instructions``). They are the
data family of the CoLoRA paper. A site has one subtask: 32 examples to train on and 16 to test. Similar sites all write
a question about a sentence, on different aspects of time. Unlike sites write a question, change a sentence, state a
related fact and answer a question.

Every result is appended to ``benchmarks/results/instructions.jsonl``; results that the file has are not run again.

python benchmarks/instructions.py FOLDER [SEEDS] [ARM …]     (1, all arms)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomli_w
from bigbench import rows_of
from claim import RESULTS, known_results, mean_of, run

POOLS = {
    "similar": (
        "subtask003_mctaco_question_generation_event_duration",
        "subtask009_mctaco_question_generation_event_ordering",
        "subtask012_mctaco_question_generation_absolute_timepoint",
        "subtask015_mctaco_question_generation_frequency",
    ),
    "unlike": (
        "subtask012_mctaco_question_generation_absolute_timepoint",
        "subtask034_winogrande_question_modification_object",
        "subtask037_qasc_generate_related_fact",
        "subtask041_qasc_answer_generation",
    ),
}
ARMS = (
    "local,train.lr=1e-3",
    "local,train.lr=3e-3",
    "colora,train.lr=1e-3",
    "colora,train.lr=3e-3",
    "colora,train.lr=1e-2",
    "colora+lora,train.lr=1e-2,train.private_lr=1e-3",
)
RECIPE = {
    "name": "instructions",
    "rounds": 6,
    "model": {"source": "asset:smollm2-135m-instruct", "max_length": 64},
    "adapter": {"rank": 8, "alpha": 16.0, "target_modules": ["q_proj", "v_proj"]},
    "train": {"steps": 4, "batch_size": 8, "lr": 1e-3, "lr_schedule": "cosine", "final_steps": 4},
    "evaluation": {"every": 0, "batch_size": 16, "max_new_tokens": 24},
    "data": {"task": "generation", "train": 32, "test": 16},
}


def recipe_of(pool: str, tasks: Path, folder: Path) -> Path:
    """Write the rows of a pool's sites and its recipe; return the recipe's path."""
    sites: list[dict[str, Any]] = []
    for name in POOLS[pool]:
        examples = json.loads((tasks / name / "task.json").read_text(encoding="utf-8"))["examples"]
        rows = folder / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(examples, ())))
        sites.append({"name": name.partition("_")[0], "source": str(rows)})
    recipe = folder / f"{pool}.toml"
    recipe.write_text(tomli_w.dumps({**RECIPE, "site": sites}))
    return recipe


def main() -> None:
    tasks, seeds = Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 1
    arms = sys.argv[3:] or ARMS
    path = RESULTS / "instructions.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for pool in POOLS:
                recipe = recipe_of(pool, tasks, Path(folder))
                for arm in arms:
                    name = f"{pool},{arm}"
                    result = known_results(path).get((name, seed))
                    if result is None:
                        result = run(recipe, arm, seed, Path(folder) / name.replace("/", "-")) | {"arm": name}
                        with path.open("a") as file:
                            file.write(json.dumps(result) + "\n")
                    print(f"seed {seed} {name}: {mean_of(result):.3f}, {result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
