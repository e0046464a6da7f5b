"""Many questions: one document, read and compressed once -> answers to several questions, each on a copy of the cache.

    python examples/many_questions.py --file report.txt "Who wrote it?" "What went wrong?"

The questions are not known while the document is compressed (query-agnostic), so the policy must choose without them.
Prints the answers, how long reading took, and what is held.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch

import headwise

QUESTIONS = ("What is this text about?", "Which command goes to the next line?", "How is a breakpoint set?")


def ask(model, tokenizer, cache, read, question, new_tokens):
    """The answer to one question about what the cache has read."""
    more = tokenizer(f"\n\n{question}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([read, more.to(read.device)], dim=1)
    # The cache itself stays as it was.
    output = model.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    """Read once, ask often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--file", type=Path, help="Python's manual of its debugger unless given")
    parser.add_argument("--policy", default="peak-attention:keep=0.3", help="as on the command line of headwise")
    parser.add_argument("--new-tokens", type=int, default=40)
    asked = parser.parse_args()

    model, tokenizer = headwise.load_default_model()
    text = topics["debugger"] if asked.file is None else asked.file.read_text(encoding="utf-8")
    read = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    count = read.shape[1]
    cache = headwise.HeadwiseCache(model, asked.policy, tokenizer=tokenizer, prompt_tokens=count)
    began = time.perf_counter()
    with torch.no_grad():
        model(read, past_key_values=cache, logits_to_keep=1)
    reading = time.perf_counter() - began
    for question in asked.questions:
        print(f"> {question}\n{ask(model, tokenizer, cache, read, question, asked.new_tokens)}\n")
    held = cache.report().allocated_bytes / cache.report().full_bytes
    print(f"{count:,} tokens read once in {reading:.1f} s; {held:.0%} of the bytes held")


if __name__ == "__main__":
    main()
