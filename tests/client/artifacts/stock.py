"""Run without colora: loads exported folders as any user of transformers and PEFT would; writes logits and answers.

Each line of standard input is the path of a file of jobs; "done" follows when their results are written.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

assert importlib.util.find_spec("colora") is None
for line in sys.stdin:
    todo = json.loads(Path(line.strip()).read_text())
    found, answers = {}, {}
    for job in todo["jobs"]:
        kind = AutoModelForSequenceClassification if job["labels"] else AutoModelForCausalLM
        more = {"num_labels": job["labels"]} if job["labels"] and job["base"] else {}
        model = kind.from_pretrained(job["base"] or job["folder"], dtype=torch.float32, **more)
        if job["base"] and not job.get("bare"):
            model = PeftModel.from_pretrained(model, job["folder"])
        model.eval()
        tokenizer = AutoTokenizer.from_pretrained(job["folder"])
        rows, said = [], []
        with torch.no_grad():
            for text in todo["texts"]:
                batch = tokenizer([text], return_tensors="pt", return_token_type_ids=False)
                logits = model(**batch).logits
                rows.append(logits.numpy().reshape(-1, logits.shape[-1])[-1])
                if job["labels"]:
                    said.append(int(rows[-1].argmax()))
                else:
                    out = model.generate(**batch, do_sample=False, max_new_tokens=job["tokens"])
                    said.append(tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
        found[job["name"]], answers[job["name"]] = np.concatenate(rows), said
    np.savez(todo["out"], **found)
    Path(todo["out"]).with_suffix(".json").write_text(json.dumps(answers))
    print("done", flush=True)
