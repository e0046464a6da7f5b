"""LESS the long way, in double precision: networks as the paper trains them, sums of exponentials as it defines them.

Nothing here is shared with `headwise.less` but the container that the networks are handed over in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from headwise.less.features import LayerFeatures, LessKernels
from headwise.policies import list_policies
from headwise.weights import sample_weights
from oracle import OracleCore, rows_of

FEATURES, WIDTH = 4, 24


@dataclass
class Networks:
    """Those of one layer, in the form that is trained; h KV heads, g query heads for each."""

    a1: torch.Tensor  # h g d w
    a2: torch.Tensor  # h g w r
    b1: torch.Tensor  # h d w
    b2: torch.Tensor  # h w r
    b3: torch.Tensor  # h r r
    d1: torch.Tensor  # h r
    d2: torch.Tensor  # h r

    def phi(self, query):
        """Features of queries, `b h g q d`."""
        hidden = gelu(torch.einsum("bhgqd,hgdw->bhgqw", query.double(), self.a1))
        return gelu(torch.einsum("bhgqw,hgwr->bhgqr", hidden, self.a2)).abs()

    def psi(self, keys):
        """Features of keys, `b h n d`."""
        hidden = gelu(torch.einsum("bhnd,hdw->bhnw", keys.double(), self.b1))
        scaled = self.d1.abs()[:, None] * gelu(torch.einsum("bhnw,hwr->bhnr", hidden, self.b2))
        return (scaled + torch.einsum("bhnr,hrs->bhns", scaled, self.b3) * self.d2[:, None]).abs()

    def folded(self):
        """As the package takes them."""
        mix = self.d1.abs()[:, :, None] * (torch.eye(self.b3.shape[-1]) + self.b3 * self.d2[:, None])
        return LayerFeatures(*(t.float() for t in (self.a1, self.a2, self.b1, self.b2, mix)))


def draw(heads, group, dim, features=FEATURES, width=WIDTH, seed=0):
    """Random networks whose weights are large enough for the state to be seen in the output."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        limit = math.sqrt(6 / sum(shape[-2:]))
        return (torch.rand(*shape, generator=generator, dtype=torch.double) * 2 - 1) * limit

    # The official initial value of the last two would leave the test blind.
    return Networks(
        uniform(heads, group, dim, width),
        uniform(heads, group, width, features),
        uniform(heads, dim, width),
        uniform(heads, width, features),
        uniform(heads, features, features),
        torch.rand(heads, features, generator=generator, dtype=torch.double) + 0.05,
        torch.randn(heads, features, generator=generator, dtype=torch.double),
    )


def networks_of(model, layers=None, **options):
    """Random networks for those layers of a model, or for all of them."""
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = range(config.num_hidden_layers) if layers is None else layers
    return {index: draw(kv_heads, heads // kv_heads, dim, seed=index, **options) for index in layers}


def kernels_of(model, networks, policies=None):
    """The same, as if they had been trained for the model, with those policies or with all there are."""
    policies = list_policies() if policies is None else policies
    about = {"model": type(model).__name__, "policies": list(policies)}
    return LessKernels({i: n.folded() for i, n in networks.items()}, about, sample_weights(model))


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def definition(networks, query, keys, values, visible, gone, options):
    """Equation 4 as it is written.

    Args:
        visible: kept columns that a query sees, `b h q t`.
        gone: columns that were folded in before, `b h t`.
    """
    logits = torch.einsum("bhgqd,bhtd->bhgqt", query.double(), keys.double()) * options.scaling
    if options.softcap is not None:
        logits = options.softcap * (logits / options.softcap).tanh()
    exact = logits.exp() * visible[:, :, None]
    product = torch.einsum("bhgqr,bhtr->bhgqt", networks.phi(query), networks.psi(keys))
    weights = exact + product * gone[:, :, None, None]
    total = weights.sum(-1)
    if options.sinks is not None:
        total = total + options.sinks.double().exp()[None, :, :, None]
    return torch.einsum("bhgqt,bhte->bhgqe", weights, values.double()) / total[..., None]


def state(networks, keys, values, gone):
    """The sums over the columns that are gone: features times values, and features."""
    features = networks.psi(keys) * gone[..., None]
    return torch.einsum("bhtr,bhte->bhre", features, values.double()), features.sum(2)


class LessOracle(OracleCore):
    """The masked oracle with a memory: what it masks is still attended to, through the networks."""

    def __init__(self, core, networks):
        super().__init__(core)
        self.networks = networks

    def attend(self, query, keys, values, mask, options):
        old = self.seen
        before = None if self.keys is None else (self.alive, self.real[:, None] & ~self.alive)
        plain = super().attend(query, keys, values, mask, options)
        if before is None:
            return plain
        b, _, q, _ = keys.shape
        mask = torch.ones(b, q, self.seen, dtype=torch.bool).tril(old) if mask is None else mask
        alive, gone = (torch.nn.functional.pad(m, (0, q), value=v) for m, v in zip(before, (True, False), strict=True))
        visible = mask[:, None] & alive[:, :, None]
        merged = definition(self.networks, query, self.keys, self.values, visible, gone, options)
        return merged.to(plain.dtype)

    @property
    def gone(self):
        """Real columns that it holds no more."""
        return self.real[:, None] & ~self.alive

    @property
    def state(self):
        """What the memory should hold."""
        return state(self.networks, self.keys, self.values, self.gone)


def use_less_oracle(cache, networks):
    """Replace the core of every layer of a fresh cache."""
    for layer in cache.headwise_layers:
        layer.core = LessOracle(layer.core, networks[layer.core.index])
    return cache


class StateChecker:
    """Watches a `LayerCache` and compares every pass with the definition, whatever it chose to keep.

    Attributes:
        effect: the largest difference that the state made to an output.
    """

    def __init__(self, core, networks, tolerance=2e-5):
        self.core, self.networks, self.tolerance = core, networks, tolerance
        self.effect = 0.0
        self.forget()
        self._attend, self._select, self._reset = core.attend, core.select, core.reset
        core.attend, core.select, core.reset = self.attend, self.select, self.reset

    def forget(self):
        self.keys = self.values = None

    def attend(self, query, keys, values, mask, options):
        core = self.core
        if core.repetition_chunk is not None:
            return self._attend(query, keys, values, mask, options)
        core.accept()
        if self.keys is None:
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        old = core.seen
        held = torch.ones(*self.keys.shape[:2], old, dtype=torch.bool)
        if core.store is not None:
            held = self.held()
        self.keys = torch.cat([self.keys[:, :, :old], keys.detach()], 2)
        self.values = torch.cat([self.values[:, :, :old], values.detach()], 2)
        output = self._attend(query, keys, values, mask, options)
        count = keys.shape[2]
        rows = torch.arange(old + count)
        real = core.log.real(rows.expand(len(keys), 1, -1))
        seen = (rows <= rows[old:, None])[None] if mask is None else mask
        kept = torch.nn.functional.pad(held, (0, count), value=True)
        gone = torch.nn.functional.pad(real[..., :old] & ~held, (0, count))
        arguments = self.networks, query, self.keys, self.values, seen[:, None] & kept[:, :, None]
        expected = definition(*arguments, gone, options)
        counted = real[:, 0, old:, None][:, None, None]
        close(output * counted, expected.nan_to_num() * counted, self.tolerance)
        if bool(gone.any()):
            without = definition(*arguments, torch.zeros_like(gone), options)
            self.effect = max(self.effect, float(((expected - without).nan_to_num() * counted).abs().max()))
        return output

    def select(self, indices):
        self._select(indices)
        if self.keys is not None:
            self.keys, self.values = self.keys[indices], self.values[indices]

    def reset(self):
        self._reset()
        self.forget()

    def held(self):
        """Columns that are stored, for every head."""
        at = torch.zeros(*self.core.store.lengths.shape, self.core.seen, dtype=torch.bool)
        for row, sequence in enumerate(rows_of(self.core)):
            for head, columns in enumerate(sequence):
                at[row, head, list(columns)] = True
        return at

    def check_state(self):
        """Every real token is either stored or summed up in the state, once."""
        core = self.core
        core.accept()
        held, seen = self.held(), torch.arange(core.seen).expand(len(self.keys), 1, -1)
        gone = core.log.real(seen) & ~held
        sums, mass = state(self.networks, self.keys[:, :, : core.seen], self.values[:, :, : core.seen], gone)
        if core.evicted.sums is None:
            assert not bool(gone.any())
            return
        close(core.evicted.sums, sums, self.tolerance)
        close(core.evicted.mass, mass, self.tolerance)


def watch(cache, networks, **options):
    """A checker for every layer of a fresh cache."""
    return [StateChecker(layer.core, networks[layer.core.index], **options) for layer in cache.headwise_layers]


def close(mine, its, tolerance):
    """Within so much of the size of what is expected."""
    size = max(1.0, float(its.abs().max())) if its.numel() else 1.0
    torch.testing.assert_close(mine.double(), its.double(), atol=tolerance * size, rtol=0)
