"""Auto: the budget is spent and not exceeded, and nothing with the same bytes would have lost less."""

from __future__ import annotations

import itertools

import pytest
import torch

import headwise
import tiny
from headwise.errors import ConfigurationError
from headwise.policies.byte_allocation import ByteAllocation
from headwise.policies.choice import FormatLoss
from headwise.policies.tokens import Tokens
from headwise.quant.codes import hadamard

PAIR = 4 * 2 * 14
# Beside it, a row has its column and what it was worth.
ROW = PAIR + 4 + 4
HEADS = 4 * 4

loss = headwise.Auto.format_loss


def read(policy, *lengths, **options):
    """The cache after prompts of those lengths."""
    model = tiny.llama(layers=4, heads=8, kv_heads=4)
    ids, mask = tiny.left_padded(*(tiny.prompt(n, seed=n)[0] for n in lengths))
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer(), **options)
    with torch.no_grad():
        at = (mask.cumsum(1) - 1).clamp(min=0)
        model(input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache)
    return cache


def bytes_of(cache):
    """Bytes of the rows of every sequence."""
    stores = [layer.core.store for layer in cache.headwise_layers]
    pools = [store.exact for store in stores] + [part.pool for store in stores for part in store.coded]
    return sum(pool.lengths.sum(1) * pool.row_bytes for pool in pools).tolist()


@pytest.mark.parametrize(
    ("wrap", "least"), [(lambda policy: policy, 0.9), (headwise.Match, 0.88)], ids=["alone", "matched"]
)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_a_share_of_the_bytes_is_spent_by_every_sequence(ratio, wrap, least):
    """Biases are counted before there are any."""
    lengths = (230, 170)
    cache = read(wrap(headwise.Auto(ratio=ratio, window=8, recent=8)), *lengths)
    for used, length in zip(bytes_of(cache), lengths, strict=True):
        budget = ratio * length * HEADS * PAIR
        # Formats change for a whole head at once, and what that leaves is not spent.
        assert least * budget <= used <= budget


def test_a_row_of_any_format_takes_the_two_bytes_of_its_bias(monkeypatch):
    seen = []
    monkeypatch.setattr(headwise.Auto, "format_loss", lambda *given: seen.append(loss(*given)) or seen[-1])
    once = headwise.Auto(ratio=0.5, of="prompt")
    for policy in (once, headwise.Match(once)):
        read(policy, 100)
    alone, matched = seen[0].row_bytes, seen[-1].row_bytes
    assert alone[0] == ROW - 4
    assert [mine - its for mine, its in zip(matched, alone, strict=True)] == [2] * 4


def test_bytes_and_rows_are_budgets_too():
    for policy in (headwise.Auto(bytes=120_000, window=8), headwise.Auto(ratio=0.5, window=8).with_bytes(120_000)):
        assert 108_000 <= bytes_of(read(policy, 230))[0] <= 120_000
    cache = read(headwise.Auto(recovery=0.9, window=8), 230, budget="120kB")
    assert 108_000 <= bytes_of(cache)[0] <= 120_000
    assert 0.9 * 60 * HEADS * ROW <= bytes_of(read(headwise.Auto(ratio=60, window=8), 230))[0] <= 60 * HEADS * ROW


def test_a_cache_in_half_precision_has_room_for_more_rows():
    cache = read(headwise.Auto(ratio=0.4, window=8), 230, cache_dtype=torch.float16)
    budget = 0.4 * 230 * HEADS * 2 * 2 * 14
    assert 0.9 * budget <= bytes_of(cache)[0] <= budget


def test_all_of_the_attention_needs_all_rows_exactly():
    cache = read(headwise.Auto(recovery=1), 100)
    assert cache.report().kept_ratio == 1
    assert all((layer.core.store.formats == -1).all() for layer in cache.headwise_layers)


def test_more_recovery_takes_more_bytes():
    sizes = [bytes_of(read(headwise.Auto(recovery=r, window=8), 150))[0] for r in (0.5, 0.9, 0.97, 0.999)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


@pytest.mark.parametrize(
    "given",
    [{}, {"ratio": 0.5, "bytes": 9}, {"ratio": 1.5}, {"recovery": -1}, {"bytes": 0}, {"ratio": 0.5, "sinks": -1}],
)
def test_what_cannot_be_is_refused(given):
    with pytest.raises(ConfigurationError):
        headwise.Auto(**given)
    with pytest.raises(ConfigurationError, match="chooses the bits itself"):
        headwise.Quantized(headwise.Auto(ratio=0.5))


def tokens_of(batch, heads, count):
    valid = torch.ones(batch, heads, count, dtype=torch.bool)
    length = torch.full((batch, 1, 1), count)
    position = torch.arange(count).expand(batch, heads, -1)
    return Tokens(position, count - 1 - position, valid, valid, length, length, None, None, 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1500.0, 2500.0, 4000.0])
def test_nothing_loses_less_for_the_bytes(seed, budget):
    """Against every format and every number of rows of three heads."""
    torch.manual_seed(seed)
    count, exact, sizes = 14, 3, (100, 40, 25)
    scores = [torch.rand(1, 2, count), torch.rand(1, 1, count)]
    losses = [torch.cat([torch.zeros(1, *s.shape[:2]), torch.rand(2, *s.shape[:2]).sort(0).values]) for s in scores]
    found = [FormatLoss(loss, sizes, 96) for loss in losses]
    heads = ByteAllocation(scores, [tokens_of(1, s.shape[1], count) for s in scores], found, exact)
    keep, formats = heads.at(heads.price(torch.tensor([budget], dtype=torch.float64)))

    options = []
    for layer, score in enumerate(scores):
        for head in range(score.shape[1]):
            squares = score[0, head].double().sort(descending=True).values.square()
            options.append(
                [
                    (
                        min(n, exact) * sizes[0] + max(n - exact, 0) * size,
                        float(losses[layer][f, 0, head]) + float(squares[n:].sum()),
                    )
                    for f, size in enumerate(sizes)
                    for n in range(count + 1)
                ]
            )
    taken = lost = 0.0
    for layer, score in enumerate(scores):
        for head in range(score.shape[1]):
            mine, n = score[0, head], int(keep[layer][0, head].sum())
            assert set(keep[layer][0, head].nonzero().flatten().tolist()) == set(mine.topk(n).indices.tolist())
            f = int(formats[layer][0, head]) + 1
            taken += min(n, exact) * sizes[0] + max(n - exact, 0) * sizes[f]
            lost += float(losses[layer][f, 0, head]) + float(mine.double().sort().values[: count - n].square().sum())
    assert taken <= budget
    least = min(
        sum(loss for _, loss in combo) for combo in itertools.product(*options) if sum(b for b, _ in combo) <= taken
    )
    assert lost == pytest.approx(least, abs=1e-5)


def losses_of(*lengths, **options):
    """What formats cost, by layer, and what that was found from."""
    found = []

    class Spying(headwise.Auto):
        def format_loss(self, evidence):
            found.append((super().format_loss(evidence), evidence))
            return found[-1][0]

    read(Spying(ratio=0.5, **options), *lengths)
    return found


def test_padding_and_prompts_shorter_than_the_window_do_not_change_what_rounding_costs():
    both = losses_of(120, 50, window=60, recent=4)
    alone = [losses_of(length, window=60, recent=4) for length in (120, 50)]
    for layer, (loss, _) in enumerate(both):
        for sequence in range(2):
            expected = alone[sequence][layer][0].losses[:, 0]
            torch.testing.assert_close(loss.losses[:, sequence], expected, rtol=1e-3, atol=1e-9)


def test_rounding_costs_the_mean_square_of_what_the_newest_queries_get_wrong():
    """One head at a time, in fp64 and by matrices; relative to values, and scaled as dropping is."""
    for loss, evidence in losses_of(90, window=16, recent=4):
        for head in range(4):
            query = evidence.query[0, head, :, -16:].double()
            keys, values = evidence.keys[0, head].double(), evidence.values[0, head].double()
            turn = hadamard(keys.shape[-1], keys.device).double()
            codes = {bits: [decoded(rows, turn, bits) for rows in (keys, values)] for bits in (8, 4)}
            hidden = torch.arange(90)[None, :] > torch.arange(74, 90)[:, None]

            def attend(keys, query=query, hidden=hidden):
                logits = query @ keys.T / keys.shape[-1] ** 0.5
                return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)

            weights = attend(keys)
            seen = weights.amax(dim=(0, 1))
            more = seen.maximum(evidence.repetition_peaks[0, head].double()).square().sum() / seen.square().sum()
            scale = 0.3 * more / values.square().sum(dim=-1).mean()
            for number, (key_bits, value_bits) in enumerate(((8, 8), (8, 4), (4, 4)), start=1):
                moved = (attend(codes[key_bits][0]) - weights) @ values
                misread = weights @ (codes[value_bits][1] - values)
                expected = scale * sum(e.square().sum(dim=-1).mean() for e in (moved, misread))
                assert float(loss.losses[number, 0, head]) == pytest.approx(float(expected), rel=0.02)


def decoded(rows, turn, bits):
    """Rows as their codes have them, each by its own extremes in fp16; the first 4 and the newest 4 are exact."""
    turned = rows @ turn
    least, most = (turned.amin(dim=-1, keepdim=True), turned.amax(dim=-1, keepdim=True))
    step, least = ((most - least) / (2**bits - 1)).half().double(), least.half().double()
    read = (((turned - least) / step).round().clamp(0, 2**bits - 1) * step + least) @ turn.T
    read[:4], read[-4:] = rows[:4], rows[-4:]
    return read


def test_fewer_bits_cost_more_and_exact_rows_nothing():
    for loss, _ in losses_of(120, window=8, recent=4):
        exact, k8v8, k8v4, k4v4 = loss.losses
        assert (exact == 0).all() and (k8v8 > 0).all()
        assert (k8v8 < k8v4).all() and (k8v4 < k4v4).all()
        assert loss.row_bytes == (ROW, 14 + 4 + 14 + 4 + 8, 14 + 4 + 7 + 4 + 8, 7 + 4 + 7 + 4 + 8)


def test_later_rows_get_the_bits_of_their_head_or_as_many_as_are_asked_for():
    """Where all are kept whatever they are worth, 8."""
    later = {None: None, 8: 0, 4: 2}
    for bits, format in later.items():
        assert headwise.Auto(ratio=0.5, later_bits=bits).precision.later == format
    assert headwise.Auto(ratio=0.5, of="prompt").precision.later == 0
    assert headwise.Auto(ratio=0.5, of="prompt", later_bits=4).precision.later == 2
    with pytest.raises(ConfigurationError, match="later_bits must be 8, 4 or None, got 16"):
        headwise.Auto(ratio=0.5, later_bits=16)
