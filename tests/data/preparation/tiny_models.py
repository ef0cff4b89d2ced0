"""Tiny models of transformers with random weights, saved as a user has them: with processor and tokenizer."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

try:  # as recent versions name those that need no torchvision
    from transformers import BlipImageProcessorPil as BlipImageProcessor
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import BlipImageProcessor, CLIPImageProcessor

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = "a red blue large ball cat dog b video of what happens describe left right USER: ASSISTANT:".split()
VOCABULARY = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
SIZE = {"height": 32, "width": 32}
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_max_length=16,
    )


def _save(folder: Path, model: torch.nn.Module, processor: Any) -> Path:
    for name, weight in model.named_parameters():  # so that outputs depend on the inputs
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)  # type: ignore[operator]
    processor.save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    """An image-to-text model without a chat template."""
    torch.manual_seed(0)
    (folder.parent / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS])
    )
    tokenizer = BertTokenizerFast(str(folder.parent / "vocab.txt"))
    text = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    text |= dict(num_attention_heads=2, bos_token_id=1, sep_token_id=2, eos_token_id=2, pad_token_id=0)
    config = BlipConfig(text_config=text, vision_config=VISION | {"patch_size": 16}, projection_dim=16)
    processor = BlipProcessor(BlipImageProcessor(size=SIZE), tokenizer)
    return _save(folder, BlipForConditionalGeneration(config), processor)


def save_llava(folder: Path) -> Path:
    """An image-text-to-text model with a chat template."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(**VISION, patch_size=16)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCABULARY["<image>"],
        vision_feature_layer=-1,
    )
    tokenizer = _tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return _save(folder, LlavaForConditionalGeneration(config), processor)


def save_clip(folder: Path) -> Path:
    """A model that compares images with texts."""
    torch.manual_seed(0)
    text = dict(vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    text |= dict(
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    config = CLIPConfig(text_config=text, vision_config=VISION | {"patch_size": 16}, projection_dim=16)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    return _save(folder, CLIPModel(config), CLIPProcessor(images, _tokenizer()))
