"""What the published evaluation of one set with one seed costs, emulated.

Emulates evaluate.py and evaluate_main.py of gmkim-ai/PromptKD at 383182f on stock transformers: batches of 8 in the
order of the file; for each, the loss of the first reference with float32 logits of all 512 positions, then `generate`
for all 8 until the last has ended, prompts padded on the left to 256; ROUGE-L after everything, in one process.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from promptkd.evaluation.rouge import rouge_l
from promptkd.evaluation.test_sets import read_set
from promptkd.models.loading import load_causal_lm, load_tokenizer

LONGEST, PROMPT, BATCH = 512, 256, 8


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("file", type=Path, help="valid.jsonl of a test set")
    parser.add_argument("--rows", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=10)
    return parser.parse_args()


@torch.no_grad()
def reference_loss(model, tokenizer, prompts: list, references: list[str]) -> torch.Tensor:
    """Cross-entropy of the references, padded on the right to 512 tokens, with all logits in float32."""
    eos = tokenizer.eos_token_id
    ids = torch.full((len(prompts), LONGEST), eos)
    labels = torch.full_like(ids, -100)
    for row, (prompt, text) in enumerate(zip(prompts, references)):
        response = [*tokenizer.encode(text), eos]
        sequence = [*prompt.tolist(), *response][: LONGEST + 1]
        ids[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
        labels[row, len(prompt) - 1 : len(sequence) - 1] = torch.tensor(sequence[len(prompt) :])
    logits = model(ids, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def answers(model, tokenizer, prompts: list) -> list[str]:
    eos = tokenizer.eos_token_id
    ids = torch.full((len(prompts), PROMPT), eos)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.from_numpy(prompt), 1
    out = model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        no_repeat_ngram_size=6, max_length=LONGEST, pad_token_id=eos,
    )  # fmt: skip
    return tokenizer.batch_decode(out[:, PROMPT:], skip_special_tokens=True)


def main() -> None:
    o = options()
    torch.manual_seed(o.seed)
    began = time.perf_counter()
    tokenizer = load_tokenizer(o.model)
    model = load_causal_lm(o.model, torch.float32, "model")
    rows = read_set("set", o.file, tokenizer, PROMPT, o.rows, False)
    texts: list[str] = []
    for start in range(0, len(rows.prompts), BATCH):
        prompts, references = rows.prompts[start : start + BATCH], rows.references[start : start + BATCH]
        reference_loss(model, tokenizer, prompts, [texts_of_row[0] for texts_of_row in references])
        texts += answers(model, tokenizer, prompts)
    score = sum(rouge_l(*pair, "published") for pair in zip(texts, rows.references)) / len(texts)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"seconds": seconds, "answers": len(texts), "rougeL": score, "peak_rss_gb": peak}))


if __name__ == "__main__":
    main()
