"""A tiny codec and text encoder that count their calls, and a data set that is encoded by them."""

from dataclasses import replace
from pathlib import Path

import torch

from stdit.data.build import build_plan
from stdit.data.cache.encode import encode_plan
from stdit.data.cache.keys import remembered
from stdit.data.cache.reader import CachedReader, Makers
from stdit.data.cache.store import CacheStore


class TinyCodec:
    """Keeps every second frame, row and column; counts the clips that it encodes."""

    channels = 3

    def __init__(self, name="tiny"):
        self.name, self.clips = name, 0

    def latent_shape(self, num_frames, height, width):
        return num_frames // 2, height // 2, width // 2

    def encode(self, video):
        self.clips += len(video)
        return video[:, :, ::2, ::2, ::2]

    def fingerprint(self):
        return self.name


class TinyEncoder:
    """One token per word, whose state is its number of letters and its place; keeps the captions that it encodes."""

    def __init__(self, name="text"):
        self.name, self.captions = name, []

    def encode(self, captions):
        self.captions += captions
        words = [caption.split() for caption in captions]
        length = max(map(len, words))
        states, mask = torch.full((len(words), length, 2), 99.0), torch.zeros(len(words), length)
        for b, row in enumerate(words):
            mask[b, : len(row)] = 1
            for place, word in enumerate(row):
                states[b, place] = torch.tensor([float(len(word)), float(place)])
        return states, mask

    def fingerprint(self):
        return self.name


class Work:
    """A data set with a cache."""

    def __init__(self, config, seed=0, codec="tiny", text="text"):
        self.config, self.codec, self.text = config, TinyCodec(codec), TinyEncoder(text)
        self.plan = build_plan(config, seed, known=remembered(config))
        makers = Makers(codec, text)
        self.reader = CachedReader(self.plan, config, CacheStore(config.cache_folder()), makers)

    def encode(self, **options):
        return encode_plan(self.reader, self.codec, self.text, progress=False, **options)

    def latents(self):
        """Read the latents of every view, by clip and number, from a new store."""
        reader = replace(self.reader, store=CacheStore(self.config.cache_folder()))
        found = {}
        for bucket, members in zip(self.plan.assignment.buckets, self.plan.assignment.members, strict=True):
            for index in members.tolist():
                views, _ = reader.wanted(self.plan.assignment.clips[index], bucket)
                for number, (_, key) in enumerate(views):
                    found[index, number] = reader.store.get("latents", key)
        return found


def shards(folder: Path, kind: str = "latents") -> list[Path]:
    return sorted(folder.glob(f"{kind}-*.safetensors"))


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)
