"""Planted fact: long text with one number hidden in it -> how often each policy still answers, at what size.

    python examples/planted_fact.py --trials 8 --tokens 1900

The question is part of the prompt while it is compressed (query-aware). A full-cache row and a row of random
eviction at FastGen's size are always there, on the same prompts.
"""

from __future__ import annotations

import argparse
import random
from pydoc_data.topics import topics

import torch

import headwise
from headwise.hosts.transformers.models import DEFAULT_MODEL

QUESTION = "\n\nWhat is the secret number of the {place}?"
FACT = " The secret number of the {place} is {number}. "
PLACES = ["harbour", "library", "castle", "garden", "station", "theatre", "museum", "bakery"]


def planted_prompt(tokenizer, trial, length):
    """Chat prompt of about that many tokens with one fact at a random depth, and the number to be found."""
    draw = random.Random(trial)
    text = topics[draw.choice(["debugger", "assignment", "customization", "comparisons", "execmodel", "typesmapping"])]
    words = tokenizer(text + topics["try"]).input_ids[:length]
    at = draw.randrange(len(words) // 10, 9 * len(words) // 10)
    place, number = PLACES[trial % len(PLACES)], str(draw.randrange(10000, 99999))
    fact = FACT.format(place=place, number=number)
    text = tokenizer.decode(words[:at]) + fact + tokenizer.decode(words[at:]) + QUESTION.format(place=place)
    message = [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return inputs, number


def main() -> None:
    """Run every policy on every trial and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1900, help="of the text around the fact")
    parser.add_argument("--recovery", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    arguments = parser.parse_args()

    model, tokenizer = headwise.load_default_model()
    policies = {"full": lambda _: headwise.Full()}
    for recovery in arguments.recovery:
        policies[f"FastGen({recovery})"] = lambda _, recovery=recovery: headwise.FastGen(recovery)
    policies[f"Random, size of FastGen({arguments.recovery[-1]})"] = lambda kept: headwise.Random(kept)
    found, kept = dict.fromkeys(policies, 0), {name: [] for name in policies}
    for trial in range(arguments.trials):
        inputs, number = planted_prompt(tokenizer, trial, arguments.tokens)
        inputs = inputs.to(model.device)
        for name, policy in policies.items():
            last = kept[f"FastGen({arguments.recovery[-1]})"]
            cache = headwise.HeadwiseCache(model, policy(last[-1] if last else 1.0), tokenizer=tokenizer)
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
            found[name] += number in answer
            kept[name].append(cache.report().kept_ratio)

    print(f"model {DEFAULT_MODEL}, {model.dtype}, {model.device}, torch {torch.__version__}")
    print(f"{arguments.trials} trials, {arguments.tokens} tokens of text, question visible while compressing\n")
    print("| policy | answered | tokens kept |\n|---|---|---|")
    for name in policies:
        share = sum(kept[name]) / len(kept[name])
        print(f"| {name} | {found[name]} of {arguments.trials} | {share:.0%} |")


if __name__ == "__main__":
    main()
