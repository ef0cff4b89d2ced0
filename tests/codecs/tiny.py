"""Tiny VAEs and text encoders with random weights, in the format of real ones; used by other tests, too."""

from pathlib import Path
from typing import Any

import torch

from stdit.codecs.loading import quiet

WORDS = "a an the red blue green circle square star moves left right up down on black white and is".split()

TINY_VAES: dict[str, dict[str, Any]] = {
    "AutoencoderKL": dict(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.1,
    ),
    "AutoencoderKLCogVideoX": dict(
        block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=4
    ),
    "AutoencoderKLHunyuanVideo": dict(
        block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=4
    ),
    "AutoencoderKLLTXVideo": dict(
        latent_channels=8,
        block_out_channels=[8, 8, 8, 8],
        decoder_block_out_channels=[8, 8, 8, 8],
        layers_per_block=[1, 1, 1, 1, 1],
        decoder_layers_per_block=[1, 1, 1, 1, 1],
        decoder_inject_noise=[True, True, True, True, False],
        timestep_conditioning=True,
    ),
    "AutoencoderKLWan": dict(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.5, 0.5, 1.0, 0.0],
        latents_std=[2.0, 1.0, 0.5, 1.0],
    ),
}


def save_tiny_vae(class_name: str, directory: Path | str, seed: int = 0) -> Path:
    """Save a random VAE of a diffusers class into a folder, and return the folder."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = getattr(diffusers, class_name)(**TINY_VAES[class_name])
        if class_name == "AutoencoderKLLTXVideo":
            vae.latents_mean.normal_()
            vae.latents_std.uniform_(0.5, 2.0)
    vae.save_pretrained(directory)
    return Path(directory)


def save_tiny_t5(directory: Path | str, seed: int = 0) -> Path:
    """Save a random T5 encoder of width 16 and a word tokenizer into a folder, and return the folder."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T5EncoderModel(
            T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(["<pad>", "</s>", "<unk>"], closing="</s>"),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    with quiet("transformers"):
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def save_tiny_bert(directory: Path | str, seed: int = 0, depth: int = 2) -> Path:
    """Save a random BERT of width 16 and a word-piece tokenizer into a folder, and return the folder."""
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = {
        word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=128,
        )
        model = BertModel(config)
    with quiet("transformers"):
        model.save_pretrained(directory)
    BertTokenizer(vocab=vocabulary).save_pretrained(directory)
    return Path(directory)


def _word_tokenizer(special: list[str], closing: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {closing}", special_tokens=[(closing, vocabulary[closing])]
    )
    return tokenizer


def tiny_opensora_vae(seed: int = 0) -> Any:
    """Open-Sora's video VAE, random and narrow, with 2 x 2 pixels a latent instead of 8 x 8."""
    from stdit.codecs.opensora_vae import OpenSoraCodec, OpenSoraVAEConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OpenSoraCodec(
            OpenSoraVAEConfig(
                block_out_channels=(8, 8),
                filters=4,
                channel_multipliers=(1, 2, 2),
                temporal_downsample=(True, True),
                num_res_blocks=1,
                norm_num_groups=2,
            )
        )
