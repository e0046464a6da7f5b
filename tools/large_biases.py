"""Large biases: sizes and channels -> what rows of few bits cost the default model when its keys get that bias.

    OMP_NUM_THREADS=1 python tools/large_biases.py --channels 31 --sizes 0,30,100,300

The bias is added to the keys of every head in every layer, before they are turned. Of 64 channels, 31 and 63 turn
slowest, and 0 and 32 fastest. Prints KL divergence in nats to exact rows of the same model, mean of the tokens fed
behind the context; "all alike" is every head in the bits asked for, whatever they do to it. No random numbers.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

import headwise
from headwise.quant.formats import Precision

TEXT = Path(__file__).parents[1] / "LICENSE"
# Tokens fed in one pass.
STEP = 8


class AllAlike(headwise.Quantized):
    """No head gets other bits than were asked for."""

    @property
    def precision(self) -> Precision:
        """One format, come what may."""
        return Precision((self.format,), self.recent, self.sinks)


def add_bias(model: nn.Module, size: float, channels: list[int]) -> None:
    """The same in every head."""
    for layer in model.model.layers:
        projection = layer.self_attn.k_proj
        bias = torch.zeros(projection.out_features // layer.self_attn.head_dim, layer.self_attn.head_dim)
        bias[:, channels] = size
        projection.bias = nn.Parameter(bias.flatten().to(projection.weight.dtype), requires_grad=False)


@torch.no_grad()
def read(model, tokenizer, ids, context: int, policy):
    """Logarithms of the probabilities of every next token behind the context, and what was held."""
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tokenizer)
    model(ids[:, :context], past_key_values=cache)
    found = [model(new, past_key_values=cache).logits for new in ids[:, context:].split(STEP, dim=1)]
    return torch.cat(found, dim=1).log_softmax(dim=-1), cache.report()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", default="31")
    parser.add_argument("--sizes", default="0,30,100,300")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--context", type=int, default=384)
    parser.add_argument("--fed", type=int, default=64)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore", headwise.HeadwiseWarning)
    model, tokenizer = headwise.load_default_model(dtype=torch.float32, device="cpu")
    text = TEXT.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : chosen.context + chosen.fed]
    for size in map(float, chosen.sizes.split(",")):
        add_bias(model, size, [int(channel) for channel in chosen.channels.split(",")])
        exact, _ = read(model, tokenizer, ids, chosen.context, headwise.Full())
        for name, kind in (("all alike", AllAlike), ("Quantized", headwise.Quantized)):
            found, report = read(model, tokenizer, ids, chosen.context, kind(headwise.Full(), chosen.bits))
            divergence = float((exact.exp() * (exact - found)).sum(dim=-1).mean())
            said = f"{divergence:.5f}  {report.used_bytes:,} bytes  {report.format_counts}"
            sys.stdout.write(f"{size:6g}  {name}  {said}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
