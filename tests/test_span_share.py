"""What heads give a marked span: by the formula of the paper, and as a picture."""

from __future__ import annotations

import pytest
import torch

import headwise
import models
from headwise.hosts.transformers.span_share import span_shares
from headwise.report.share_picture import save_shares
from models import full_layers

SPANS = (((5, 9), (20, 22)),)


@pytest.mark.shapes
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])
def test_shares_before_and_after(family):
    """In the first layer that is steered, g becomes g / (g + alpha (1 - g)); PASTA, equation 2."""
    model, ids = models.shared(family), models.prompt(seed=2)
    first, last = next(iter(full_layers(family))), models.LAYERS - 1
    marked, steering = headwise.Marked(SPANS, ids.shape[1]), headwise.Steering({first: [0, 3], last: [1]}, 0.05)
    before, after, heads = span_shares(model, ids, marked, steering)
    assert heads == {first: [0, 3], last: [1]}
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    columns = torch.tensor([*range(5, 9), *range(20, 22)])
    for layer, weights in enumerate(attentions):
        torch.testing.assert_close(before[layer], weights[0, :, -1, columns].sum(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(before[: first + 1, 1:3], after[: first + 1, 1:3])
    share = before[first, [0, 3]]
    torch.testing.assert_close(after[first, [0, 3]], share / (share + 0.05 * (1 - share)), atol=1e-5, rtol=1e-5)
    assert after[last, 1] > before[last, 1]


def test_a_target_share_is_reached_or_was_there():
    model, ids = models.shared("qwen3"), models.prompt(seed=2)
    before, after, _ = span_shares(model, ids, headwise.Marked(SPANS, ids.shape[1]), headwise.TargetShare([0], 0.3))
    for share, steered in zip(before[0].tolist(), after[0].tolist(), strict=True):
        # The logarithm of what is missing is added, and then all is made one again.
        raised = max(share, 0.3)
        assert steered == pytest.approx(raised / (raised + 1 - share), abs=1e-5)


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / "shares.png"
    shares = torch.rand(3, 4)
    shares[1] = torch.nan
    save_shares(shares, shares.sqrt(), {0: [1, 2]}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(headwise.InputError):
        save_shares(shares, shares, {}, tmp_path / "nowhere" / "shares.png")
