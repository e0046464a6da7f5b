"""Tiny random models that see, images and videos for them, and prompts with placeholders in their places."""

from __future__ import annotations

import functools

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import headwise
import tiny
from tiny import VOCABULARY

# An image stands in the prompt as so many placeholders between two marks.
IMAGE, VIDEO, BEGIN, END, PATCHES = 100, 97, 98, 99, 16
WORDS = range(8, 97)

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}
_VISION = {"hidden_size": 32, "intermediate_size": 32}
_SQUARES = _VISION | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
_GRIDS = _VISION | {
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
# Positions of three axes, each for so many channels.
_AXES = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}}


def _llava():
    vision, text = CLIPVisionConfig(**_SQUARES), LlamaConfig(**_TEXT)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)
    )


def _gemma3():
    text = Gemma3TextConfig(
        **_TEXT | {"num_hidden_layers": 3},
        head_dim=16,
        sliding_window=11,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
    )
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=_SQUARES,
            text_config=text,
            mm_tokens_per_image=PATCHES,
            image_token_id=IMAGE,
            boi_token_id=BEGIN,
            eoi_token_id=END,
            tie_word_embeddings=False,
        )
    )


def _qwen2_5_vl():
    vision = _GRIDS | {"fullatt_block_indexes": [1], "window_size": 8}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=vision, text_config=_TEXT | _AXES, **_MARKS)
    )


def _qwen3_vl():
    vision = _GRIDS | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(vision_config=vision, text_config=_TEXT | _AXES | {"head_dim": 16}, **_MARKS)
    )


_BUILDERS = {"llava": _llava, "gemma3": _gemma3, "qwen2.5-vl": _qwen2_5_vl, "qwen3-vl": _qwen3_vl}
FAMILIES = tuple(_BUILDERS)
# Their placeholders have positions in time, height and width.
IN_GRIDS = ("qwen2.5-vl", "qwen3-vl")


def build(family):
    torch.manual_seed(0)
    model = _BUILDERS[family]().eval()
    # Random projections of pictures are so small that nothing would depend on them.
    for name, weight in model.named_parameters():
        if "mm_input_projection" in name:
            torch.nn.init.normal_(weight)
        elif "multi_modal_projector" in name or "merger" in name:
            weight.data.mul_(5)
    return model


shared = functools.cache(build)


def words(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS.start, WORDS.stop, (1, count), generator=generator)


def picture(placeholder=IMAGE):
    return torch.tensor([[BEGIN, *[placeholder] * PATCHES, END]])


def prompt(*parts):
    """Ids with BOS first: a number is so many words, a tensor is itself."""
    made = [words(part, seed) if isinstance(part, int) else part for seed, part in enumerate(parts)]
    return torch.cat([torch.zeros(1, 1, dtype=torch.long), *made], dim=1)


def shown(family, ids, seed=0):
    """What a processor gives a model beside those ids: pixels, and where they belong."""
    placeholders = ids == IMAGE
    count = int(placeholders.sum()) // PATCHES
    given = {}
    if family not in IN_GRIDS and count:
        given["pixel_values"] = pixels(count, 3, 8, 8, seed=seed)
    elif family in IN_GRIDS:
        kinds = placeholders.long() + 2 * (ids == VIDEO).long()
        given["mm_token_type_ids"] = kinds
        if count:
            given |= grid("pixel_values", "image_grid_thw", [1, 8, 8], count, seed)
        films = int((ids == VIDEO).sum()) // PATCHES
        if films:
            given |= grid("pixel_values_videos", "video_grid_thw", [2, 8, 4], films, seed)
    if family == "gemma3":
        given["token_type_ids"] = placeholders.long()
    return given


def grid(pixels_name, grid_name, shape, count, seed):
    patches = shape[0] * shape[1] * shape[2]
    # Three colours, two frames, two by two points.
    return {
        pixels_name: pixels(count * patches, 24, seed=seed),
        grid_name: torch.tensor([shape] * count),
    }


def pixels(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generate(family, ids, cache=None, *, seed=0, model=None, **options):
    """Plain `generate`, with pictures of that seed for the placeholders."""
    given = {"attention_mask": torch.ones_like(ids)} | shown(family, ids, seed) | options
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2} | given
    return (model or shared(family)).generate(ids, past_key_values=cache, **given)


def tokenizer():
    """Placeholders and marks are special tokens, as in the tokenizers of such models."""
    made = tiny.tokenizer()
    names = [made.convert_ids_to_tokens(token) for token in (IMAGE, VIDEO, BEGIN, END)]
    made.add_special_tokens({"additional_special_tokens": names})
    return made


TOKENIZER = tokenizer()
# One picture between words, and what is not of it.
IDS = prompt(5, picture(), 7)
TEXT = IDS.shape[1] - PATCHES
NEW = 6


def new_cache(family, policy, **options):
    return headwise.HeadwiseCache(shared(family), policy, tokenizer=TOKENIZER, **options)


def turn(family, ids, cache, **options):
    """A turn of text alone: nothing is said of the images before."""
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}
    return shared(family).generate(ids, past_key_values=cache, **given | options)
