"""Which engines and requests are refused, and rows of a batch that come, go and move."""

from __future__ import annotations

from types import SimpleNamespace

import engines
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

import chatty
import headwise
from headwise.hosts.vllm import engine, model, plugin
from headwise.hosts.vllm.door import ROWS, Door, Row
from headwise.hosts.vllm.engine import DEFAULT, ENGINE, RESUMABLE, UNKNOWN, Engine
from headwise.hosts.vllm.options import GATES, Options
from headwise.types import Kind

UNCACHED = {"enable_prefix_caching": False}
SNAPKV = {"headwise": {"policy": "snapkv", "ratio": 0.5}}


def config(model=None, parallel=None, cache=None, text=None, **engine):
    """Of an engine that can compress, but for what is given."""
    text = {"model_type": "llama", "rope_parameters": {"rope_type": "default"}} | (text or {})
    plain = {"use_mla": False, "runner_type": "generate", "uses_alibi": False, "enable_prompt_embeds": False}
    plain |= {"get_head_size": lambda: 32, "dtype": torch.float32, "skip_tokenizer_init": False}
    plain |= {"is_multimodal_model": False, "model": "nowhere", "revision": None}
    spread = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    held = {"cache_dtype": "auto", "block_size": 32, "enable_prefix_caching": True}
    given = {"speculative_config": None, "kv_transfer_config": None, "use_v2_model_runner": False}
    return SimpleNamespace(
        model_config=SimpleNamespace(**plain | (model or {}), hf_text_config=SimpleNamespace(**text)),
        parallel_config=SimpleNamespace(**spread | (parallel or {})),
        cache_config=SimpleNamespace(**held | (cache or {})),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=engine.pop("alike", False)),
        additional_config=engine.pop("additional_config", {}),
        **given | engine,
    )


def note(given):
    """As when a request is taken in by that engine."""
    ENGINE.set(Engine(given))


@pytest.fixture(autouse=True)
def alone():
    """What is noted here does not stay."""
    engine, more, rows = ENGINE.set(None), RESUMABLE.set(False), dict(ROWS)
    yield
    ENGINE.reset(engine)
    RESUMABLE.reset(more)
    ROWS.clear()
    ROWS.update(rows)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"use_mla": True}}, "latent attention"),
        ({"model": {"uses_alibi": True}}, "ALiBi"),
        ({"model": {"runner_type": "pooling"}}, "does not generate text"),
        ({"model": {"enable_prompt_embeds": True}}, "embeddings"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV transfer"),
        ({"cache": {"cache_dtype": "fp8_e4m3"}}, "8 bits"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "context parallel"),
        ({"parallel": {"prefill_context_parallel_size": 2}}, "context parallel"),
        ({"use_v2_model_runner": True}, "V2"),
        ({"parallel": {"use_ubatching": True}}, "in parts"),
        ({"text": {"num_kv_shared_layers": 10}}, "read the keys of others"),
        ({"text": {"sliding_window": 64}}, "--no-enable-prefix-caching"),
        ({"text": {"layer_types": ["full_attention", "linear_attention"]}}, "--no-enable-prefix-caching"),
        (
            {"text": {"attention_chunk_size": 64}, "cache": {"enable_prefix_caching": False}, "alike": True},
            "the same blocks",
        ),
        ({"model": {"get_head_size": lambda: 0}}, ""),
    ],
)
def test_engines_that_cannot(changes, why):
    note(config(**changes))
    with pytest.raises(ValueError, match=f"this engine cannot compress requests: .*{why}"):
        Door.validate_params(SamplingParams(extra_args=dict(SNAPKV)))
    plain = SamplingParams()
    Door.validate_params(plain)
    assert plain.extra_args is None and not plain.skip_reading_prefix_cache
    with pytest.raises(headwise.ConfigurationError, match=why):
        note(config(**changes, additional_config=SNAPKV))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": {"sliding_window": 64, "use_sliding_window": False}},
        {"text": {"layer_types": ["full_attention"] * 3}},
        {"text": {"sliding_window": 64}, "cache": UNCACHED},
    ],
)
def test_an_engine_that_can(changes):
    note(config(**changes))
    params = SamplingParams(extra_args={"headwise_policy": "keydiff", "other": 3})
    Door.validate_params(params)
    assert params.extra_args == {"other": 3, "headwise": {"policy": "keydiff", "ratio": 0.25}}
    assert params.skip_reading_prefix_cache
    again = params.clone()
    Door.validate_params(again)
    assert again.extra_args == params.extra_args


def test_prompts_that_come_in_parts():
    note(config(additional_config=SNAPKV))
    RESUMABLE.set(True)
    plain = SamplingParams()
    Door.validate_params(plain)
    assert plain.extra_args is None
    with pytest.raises(ValueError, match="comes in parts"):
        Door.validate_params(SamplingParams(extra_args=dict(SNAPKV)))


def test_the_newer_runner_takes_it_as_one_of_its_own():
    newer = pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor.interface").LogitsProcessor
    assert issubclass(Door, newer)
    door, logits = Door(None, None), torch.randn(2, 3)
    assert door.apply(logits, None) is logits and not door.add_request(0, SamplingParams())


def test_an_engine_without_the_plugin_or_of_another_release(monkeypatch):
    assert "VLLM_PLUGINS" in Engine().obstacle
    monkeypatch.setattr(UNKNOWN, "obstacle", None)
    monkeypatch.setattr(engine.vllm, "__version__", "0.45.1")
    plugin.register()
    with pytest.raises(ValueError, match=r"knows vLLM 0.29 to 0.32, and this is 0.45.1"):
        Door.validate_params(SamplingParams(extra_args=dict(SNAPKV)))
    for version, known in (("0.29.0", True), ("0.32.1rc1", True), ("0.3.2", False), ("0.33.0", False), ("1.0", False)):
        monkeypatch.setattr(engine.vllm, "__version__", version)
        assert (engine.version_obstacle() is None) == known


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ({}, True),
        ({"rope_parameters": {"rope_type": "llama3"}}, True),
        ({"rope_parameters": {"rope_type": "yarn"}}, False),
        ({"rope_parameters": None}, False),
        ({"rope_parameters": {"full_attention": {}, "rope_type": "default"}, "model_type": "gemma3_text"}, False),
        ({"model_type": "smollm3"}, False),
    ],
)
def test_policies_that_turn_queries_need_to_know_how(text, known):
    note(config(text=text))
    for policy in ("expected-attention", "adakv:over=expected-attention"):
        params = SamplingParams(extra_args={"headwise": {"policy": policy}})
        if known:
            Door.validate_params(params)
        else:
            with pytest.raises(ValueError, match="how this model makes positions is not known; take adakv"):
                Door.validate_params(params)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"parallel": {"pipeline_parallel_size": 2}}, "each process has some of the layers"),
        ({"lora_config": object()}, "with adapters or media"),
        ({"text": {"sliding_window": 64}, "cache": UNCACHED}, "whose blocks are not the same"),
        ({"model": {"is_multimodal_model": True}}, "with adapters or media"),
        ({"release": "0.29.1"}, "their rows lie together since vLLM 0.30, and this is 0.29.1"),
    ],
)
def test_engines_in_which_layers_cannot_share(changes, why, monkeypatch):
    monkeypatch.setattr(engine.Engine, "kinds_obstacle", None)
    changes = dict(changes)
    monkeypatch.setattr(engine.vllm, "__version__", changes.pop("release", "0.30.0"))
    for policy in ("pyramidkv", "kvzip:gate=true", "fastgen"):
        note(config(**changes))
        with pytest.raises(ValueError, match=f"'{policy}' layers share what stays, which cannot be served: .*{why}"):
            Door.validate_params(SamplingParams(extra_args={"headwise_policy": policy}))
    Door.validate_params(SamplingParams(extra_args={"headwise_policy": "h2o"}))
    monkeypatch.setattr(engine.vllm, "__version__", "0.30.0")
    note(config())
    Door.validate_params(SamplingParams(extra_args={"headwise_policy": "pyramidkv"}))


def test_policies_that_look_at_kinds_of_tokens_need_a_tokenizer(monkeypatch):
    asked = {"headwise": {"policy": "fastgen"}}
    monkeypatch.setattr("vllm.tokenizers.cached_tokenizer_from_config", lambda given: chatty.tokenizer())
    note(config())
    Door.validate_params(SamplingParams(extra_args=dict(asked)))
    note(config(model={"skip_tokenizer_init": True}))
    with pytest.raises(ValueError, match="looks at the kinds of tokens, which this engine does not tell: it has no"):
        Door.validate_params(SamplingParams(extra_args=dict(asked)))
    # One that does not speak as those of transformers do.
    monkeypatch.setattr("vllm.tokenizers.cached_tokenizer_from_config", lambda given: ["a", "b"])
    note(config())
    with pytest.raises(ValueError, match=r"does not tell: its tokenizer fails \(AttributeError"):
        Door.validate_params(SamplingParams(extra_args=dict(asked)))
    # A ladder without them.
    Door.validate_params(SamplingParams(extra_args={"headwise_policy": "fastgen:ladder=frequent,full"}))


def test_gates_are_those_of_the_model(folder, tmp_path, monkeypatch):
    """They are held against the files that the model is read from."""
    asked, gates = {"headwise_policy": "kvzip:gate=true"}, model._gates

    def refused(match, **changes):
        gates.cache_clear()
        note(config(**changes))
        with pytest.raises(ValueError, match=match):
            Door.validate_params(SamplingParams(extra_args=dict(asked)))

    monkeypatch.setenv(GATES, str(folder / "gates"))
    gates.cache_clear()
    note(config(model={"model": str(folder)}))
    Door.validate_params(SamplingParams(extra_args=dict(asked)))
    refused("each process has some of them", model={"model": str(folder)}, parallel={"tensor_parallel_size": 2})
    refused("how this model makes positions is not known", model={"model": str(folder)}, text={"model_type": "other"})
    other = engines.save_model(tmp_path / "other", vocabulary=64)
    refused("were trained for this one; the weights of this one differ by", model={"model": str(other)})
    (tmp_path / "empty").mkdir()
    refused("has none in safetensors", model={"model": str(tmp_path / "empty")})
    monkeypatch.setenv(GATES, str(tmp_path / "empty"))
    refused("no gates in", model={"model": str(folder)})
    monkeypatch.delenv(GATES)
    # Those that come with headwise are for its default model.
    refused("were trained for", model={"model": str(folder)})
    gates.cache_clear()


def test_kinds_of_a_prompt(monkeypatch):
    tokenizer = chatty.tokenizer()
    monkeypatch.setattr("vllm.tokenizers.cached_tokenizer_from_config", lambda given: tokenizer)
    ids = [*tokenizer("Ask, the cat!<|im_end|>")["input_ids"], 10**6]
    made = model.Model(config())
    assert made.kinds(Options("snapkv"), ids) is None
    found = made.kinds(Options("fastgen"), ids)[0].tolist()
    wanted = {"<|im_end|>": Kind.SPECIAL, ",": Kind.PUNCTUATION, "!": Kind.PUNCTUATION}
    assert found == [int(wanted.get(tokenizer.decode([id]).strip(), 0)) for id in ids[:-1]] + [0]
    assert {*found} == {0, 1, 2}


def test_a_default(monkeypatch):
    monkeypatch.setenv(DEFAULT, '{"policy": "tova"}')
    note(config())
    assert ENGINE.get().default == Options("tova", 0.25)
    params = SamplingParams()
    Door.validate_params(params)
    assert params.extra_args == {"headwise": {"policy": "tova", "ratio": 0.25}}
    without = SamplingParams(extra_args={"headwise": "off"})
    Door.validate_params(without)
    assert not without.skip_reading_prefix_cache
    # What stands in the configuration goes first.
    note(config(additional_config={"headwise": {"ratio": 0.5}}))
    assert ENGINE.get().default == Options(ratio=0.5)
    for bad, why in (("{", "no JSON object"), ('{"ratio": 7}', "ratio must be"), ("3", "is an object")):
        monkeypatch.setenv(DEFAULT, bad)
        with pytest.raises(headwise.ConfigurationError, match=why):
            note(config())


def test_rows_come_go_and_move():
    door = Door(None, None, False)
    compressed, plain = (SamplingParams(extra_args=each) for each in (SNAPKV, None))
    one, two = Row(Options("snapkv", 0.5), [7]), Row(Options("snapkv", 0.5), [7, 8])
    door.update_state(None)
    door.update_state(
        BatchUpdate(3, [], [(0, compressed, [7], []), (1, plain, [7], []), (2, compressed, [7, 8], [])], [])
    )
    assert {0: one, 2: two} == ROWS
    door.update_state(BatchUpdate(3, [], [], [(0, 1, MoveDirectionality.SWAP)]))
    assert {1: one, 2: two} == ROWS
    # The first is gone, and the last takes its place.
    door.update_state(BatchUpdate(2, [0], [], [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert {0: two, 1: one} == ROWS
    door.update_state(BatchUpdate(2, [1], [(1, plain, [7], [])], []))
    assert {0: two} == ROWS
    assert Door(None, None, False) and not ROWS
