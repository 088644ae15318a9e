"""Load exported folders with Transformers and PEFT, without colora, and write logits and answers.

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
    work = json.loads(Path(line.strip()).read_text())
    logits_of, answers_of = {}, {}
    for job in work["jobs"]:
        kind = AutoModelForSequenceClassification if job["labels"] else AutoModelForCausalLM
        options = {"num_labels": job["labels"]} if job["labels"] and job["base"] else {}
        model = kind.from_pretrained(job["base"] or job["folder"], dtype=torch.float32, **options)
        if job["base"] and not job.get("bare"):
            model = PeftModel.from_pretrained(model, job["folder"])
        model.eval()
        tokenizer = AutoTokenizer.from_pretrained(job["folder"])
        last_logits, answers = [], []
        with torch.no_grad():
            for text in work["texts"]:
                batch = tokenizer([text], return_tensors="pt", return_token_type_ids=False)
                logits = model(**batch).logits
                last_logits.append(logits.numpy().reshape(-1, logits.shape[-1])[-1])
                if job["labels"]:
                    answers.append(int(last_logits[-1].argmax()))
                else:
                    out = model.generate(**batch, do_sample=False, max_new_tokens=job["tokens"])
                    answers.append(tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
        logits_of[job["name"]], answers_of[job["name"]] = np.concatenate(last_logits), answers
    np.savez(work["out"], **logits_of)
    Path(work["out"]).with_suffix(".json").write_text(json.dumps(answers_of))
    print("done", flush=True)
