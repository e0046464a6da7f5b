"""Auto: the budget is spent and not exceeded, and nothing with the same bytes would have lost less."""

from __future__ import annotations

import itertools

import pytest
import torch

import headwise
import tiny
from headwise.errors import ConfigurationError
from headwise.policies import rounding_loss
from headwise.policies.row_allocation import RowAllocation, RowOptions
from headwise.quant.codes import hadamard
from headwise.report.formats import format_names as formats_of

PAIR = 4 * 2 * 14
# Beside it, a row has its column and what it was worth.
ROW = PAIR + 4 + 4
HEADS = 4 * 4

FORMATS = ((8, 8), (8, 4), (4, 4))

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
    assert all((layer.core.store.row_formats() == -1).all() for layer in cache.headwise_layers)


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


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.15, 0.4, 0.7])
def test_nothing_loses_less_for_the_bytes(seed, share):
    """Against every way to store seven rows of two layers, some of which must stay or may not have all bits."""
    torch.manual_seed(seed)
    sizes, rows = (25, 40, 100), []
    for count in (4, 3):
        # Some formats are of no use to some rows: they take more than another and lose as much.
        lost = (
            torch.rand(3, 1, 1, count).sort(dim=0, descending=True).values
            * torch.tensor([1, 1, 0])[:, None, None, None]
        )
        most = torch.randint(1, 4, (1, 1, count))
        least = torch.minimum(torch.randint(0, 6, (1, 1, count)).clamp(max=1), most)
        rows.append(RowOptions(torch.rand(1, 1, count), lost, least, most))
    allocation = RowAllocation(rows, sizes)
    levels = allocation.at(allocation.price(torch.tensor([share * 700.0], dtype=torch.float64)))

    flat = [
        (
            float(layer.worth[0, 0, i]),
            [1.0, *layer.lost[:, 0, 0, i].tolist()],
            int(layer.least[0, 0, i]),
            int(layer.most[0, 0, i]),
        )
        for layer in rows
        for i in range(layer.worth.shape[-1])
    ]
    taken = [0, *sizes]
    mine = [int(level) for layer in levels for level in layer.flatten()]
    for level, (_, _, least, most) in zip(mine, flat, strict=True):
        assert least <= level <= most
    spent = sum(taken[level] for level in mine)
    must = sum(taken[least] for _, _, least, _ in flat)
    assert spent <= max(share * 700, must)
    lost = sum(worth * lost[level] for level, (worth, lost, _, _) in zip(mine, flat, strict=True))
    ways = itertools.product(*(range(least, most + 1) for _, _, least, most in flat))
    best = min(
        sum(worth * lost[level] for level, (worth, lost, _, _) in zip(way, flat, strict=True))
        for way in ways
        if sum(taken[level] for level in way) <= spent
    )
    # Rows that may not have all bits are weighed as though they could.
    assert lost <= best + (1e-6 if all(most == 3 for *_, most in flat) else 0.1)


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
        for sequence, length in enumerate((120, 50)):
            expected = alone[sequence][layer][0].lost[:, 0]
            torch.testing.assert_close(loss.lost[:, sequence, :, -length:], expected, rtol=1e-3, atol=1e-9)


def test_what_rounding_is_expected_to_cost_is_what_it_costs():
    """Keys and values are rounded, and errors of logits and of values are squared; one head at a time, in fp64."""
    ratios = {format: [] for format in FORMATS}
    for loss, evidence in losses_of(300, window=16):
        keys, values = evidence.keys[0].double(), evidence.values[0].double()
        for number, (key_bits, value_bits) in enumerate(FORMATS, start=1):
            for h in range(len(keys)):
                query = evidence.query[0, h].double().flatten(0, 1)
                moved = query @ (decoded(keys[h], key_bits) - keys[h]).T * evidence.options.scaling
                misread = (decoded(values[h], value_bits) - values[h]).square().sum(-1)
                found = moved.square().mean(0) + misread / values[h].square().sum(-1).mean()
                expected = loss.lost[number, 0, h].double() / rounding_loss._ROUNDING
                ratios[key_bits, value_bits].append(float(found.mean() / expected.mean()))
    for each in ratios.values():
        assert 0.8 < sum(each) / len(each) < 1.2
        assert min(each) > 0.5 and max(each) < 2


def decoded(rows, bits):
    """Rows as their codes have them, each by its own extremes in fp16."""
    turn = hadamard(rows.shape[-1], rows.device).double()
    turned = rows @ turn
    least, most = (turned.amin(dim=-1, keepdim=True), turned.amax(dim=-1, keepdim=True))
    step, least = ((most - least) / (2**bits - 1)).half().double(), least.half().double()
    return (((turned - least) / step).round().clamp(0, 2**bits - 1) * step + least) @ turn.T


def test_fewer_bits_cost_more_and_exact_rows_nothing():
    for loss, _ in losses_of(120, window=8, recent=4):
        exact, k8v8, k8v4, k4v4 = loss.lost
        assert (exact == 0).all() and (k8v8 > 0).all()
        assert (k8v8 < k8v4).all() and (k8v4 < k4v4).all()
        assert loss.row_bytes == (ROW, 14 + 4 + 14 + 4 + 8, 14 + 4 + 7 + 4 + 8, 7 + 4 + 7 + 4 + 8)


def test_rows_of_one_head_differ_in_bits_and_what_is_worth_more_has_more_of_them():
    cache = read(headwise.Auto(ratio=0.3, window=8, recent=4), 230)
    report, mixed = cache.report(), 0
    assert sum(report.rows_by_format.values()) == sum(int(kept.sum()) for kept in report.kept_tokens)
    assert "K4V4" in report.rows_by_format and "rows" in str(report)
    for layer in cache.headwise_layers:
        store, names = layer.core.store, formats_of(layer.core.store)
        rows, formats = store.rows(), store.row_formats()
        for h in range(4):
            kept = rows.keep[0, h] & (rows.columns[0, h] >= 4) & (rows.columns[0, h] < 222)
            by_format = [rows.scores[0, h][kept & (formats == index)] for index in (0, 2)]
            if all(map(len, by_format)):
                mixed += 1
                assert by_format[0].mean() > by_format[1].mean()
            had = {("K8V8", "K8V4", "K4V4")[i] for i in formats[rows.keep[0, h]].unique().tolist() if i >= 0}
            assert names[0, h].split("+") == sorted(had, key=("K8V8", "K8V4", "K4V4").index)
    assert mixed > 4


def test_rows_lose_bits_as_their_worth_falls_and_never_get_any_back():
    """Under bytes that stay the same while more tokens come."""
    policy = headwise.Auto(bytes=60_000, window=8, recent=4, choose_every=8)
    model = tiny.llama(layers=4, heads=8, kv_heads=4)
    cache, before, fell, dropped = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer()), {}, 0, 0
    ids = tiny.prompt(300, seed=7)
    with torch.no_grad():
        model(input_ids=ids[:, :120], past_key_values=cache)
    for end in range(120, 300):
        with torch.no_grad():
            model(input_ids=ids[:, end : end + 1], past_key_values=cache, position_ids=torch.tensor([[end]]))
        now = {}
        for number, layer in enumerate(cache.headwise_layers):
            rows, formats = layer.core.store.rows(), layer.core.store.row_formats().tolist()
            for h in range(4):
                for format, kept, column in zip(
                    formats, rows.keep[0, h].tolist(), rows.columns[0, h].tolist(), strict=True
                ):
                    if kept:
                        now[number, h, column] = format
        for row, format in now.items():
            assert format >= before.get(row, -1)
            fell += row in before and format > before[row] >= 0
        dropped += len(before.keys() - now.keys())
        before = now
        if cache.headwise_layers[0].core.evicted_at == end + 1:
            assert 0.9 * 60_000 <= bytes_of(cache)[0] <= 60_000
        # First and newest rows stay numbers.
        assert all(now[at, h, c] == -1 for at in range(4) for h in range(4) for c in (0, 3, end - 3, end))
    assert fell > 50 and dropped > 1000


def test_later_rows_get_eight_bits_or_as_many_as_are_asked_for():
    assert headwise.Auto(ratio=0.5).precision.later == 0
    assert headwise.Auto(ratio=0.5, of="prompt", later_bits=4).precision.later == 2
    for bits in (16, None):
        with pytest.raises(ConfigurationError, match=f"later_bits must be 8 or 4, got {bits}"):
            headwise.Auto(ratio=0.5, later_bits=bits)


def test_rows_that_were_chosen_to_be_numbers_stay_numbers_while_others_come():
    model, ids = tiny.llama(layers=4, heads=8, kv_heads=4), tiny.prompt(160, seed=3)
    cache = headwise.HeadwiseCache(
        model, headwise.Auto(ratio=0.8, window=8, recent=4, of="prompt"), tokenizer=tiny.tokenizer()
    )

    def exact():
        rows = [layer.core.store.rows() for layer in cache.headwise_layers]
        formats = [layer.core.store.row_formats() for layer in cache.headwise_layers]
        return [r.columns[0, h][r.keep[0, h] & (f == -1)] for r, f in zip(rows, formats, strict=True) for h in range(4)]

    with torch.no_grad():
        model(input_ids=ids[:, :120], past_key_values=cache)
        before = [{c for c in head.tolist() if c < 116} for head in exact()]
        for end in range(120, 160):
            model(input_ids=ids[:, end : end + 1], past_key_values=cache)
    assert sum(map(len, before)) > 500
    assert [{c for c in head.tolist() if c < 116} for head in exact()] == before
