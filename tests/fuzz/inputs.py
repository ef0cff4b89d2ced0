"""Strategies for fuzzed inputs: valid inputs with a few changes, since pure noise is refused at its first byte."""

import json
import struct
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = (
    *("", " ", "\n", "\r\n", "\t", "\0", "\ufeff", "\u2028", "é", "😀", "\x1b[2J", "\x85"),
    *(
        '"',
        "'",
        ",",
        ";",
        ":",
        "@",
        "-",
        "--",
        "#",
        "=",
        "%s",
        "{}",
        "\\",
        "/",
        "..",
        "../../x",
        "/etc/passwd",
    ),
    *(
        "[",
        "]",
        "{",
        "}",
        "&a ",
        "*a",
        "!!python/object/apply:os.system ['true']",
        "<<: *a",
        "- ",
        "? ",
        "|",
        ">",
    ),
    *("null", "true", "nan", ".inf", "-.inf", "inf", "1e400", "-1", "0", "1.5", "1_0", "0x10", "0o7", "1:30"),
    *(
        "9" * 25,
        "9" * 5000,
        "1e-400",
        "-0.0",
        "2026-01-01",
        "2026-13-45",
        "١",
        "²",
        "a" * 300,
        "[" * 300,
        "[" * 5000,
    ),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308),
    *(
        float("inf"),
        float("-inf"),
        float("nan"),
        "",
        " ",
        "a",
        "1",
        "é",
        "\0",
        "../x",
        "/etc/passwd",
        "a" * 300,
    ),
    *([], {}, [None], [[]], [1, 2, 3, 4], ["a", 1], {"a": None}, {"": ""}, {"name": 1}),
)


@st.composite
def changed_text(draw: st.DrawFn, valid: Sequence[str]) -> str:
    """Draw a valid text with up to six edits: parts removed, doubled, replaced, or taken from another text."""
    text = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 6))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.sampled_from((0, 0, 1, 1, 2, 5, 20, 1000))))
        other = draw(st.sampled_from(valid))
        start = draw(st.integers(0, len(other)))
        new = draw(
            st.one_of(
                st.sampled_from(ODD_TEXTS),
                st.just(other[start : start + 12]),
                st.just(2 * text[begin:end]),
                st.text(st.characters(codec="utf-8"), max_size=3),
            )
        )
        text = text[:begin] + new + text[end:]
    return text


def as_bytes(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """Encode texts as UTF-8; a few have a byte order mark, invalid bytes, or a truncated character."""
    encoded = texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    others = (
        lambda data: data[:-1],
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data + b"\xff\xfe\x00",
    )
    return st.tuples(encoded, st.sampled_from((*[lambda data: data] * 6, *others))).map(
        lambda pair: pair[1](pair[0])
    )


@st.composite
def changed_tree(draw: st.DrawFn, valid: Sequence[Any]) -> Any:
    """Draw a valid JSON value with up to four entries removed, renamed, added or replaced."""
    tree = deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.sampled_from(list(_containers(tree)) or [None]))
        value = deepcopy(
            draw(st.one_of(st.sampled_from(ODD_VALUES), st.sampled_from(valid), st.text(max_size=4)))
        )
        if place is None or draw(st.integers(0, 30)) == 0:
            tree = value
        elif isinstance(place, dict):
            key = draw(st.sampled_from([*place, *place, "", "a", "name", "files", "step"]))
            _change_mapping(draw, place, key, value)
        elif place and draw(st.booleans()):
            place[draw(st.integers(0, len(place) - 1))] = value
        else:
            place.append(value)
    return tree


def _change_mapping(draw: st.DrawFn, mapping: dict[str, Any], key: str, value: Any) -> None:
    how = draw(st.sampled_from(("set", "set", "set", "remove", "rename")))
    if how == "set":
        mapping[key] = value
    elif key in mapping:
        old = mapping.pop(key)
        if how == "rename":
            mapping[draw(st.sampled_from((f"{key}s", key[:-1], key.upper(), f"{key}.a", f"{key}[0]")))] = old


def _containers(tree: Any) -> Any:
    """Yield every mapping and list of a tree."""
    if isinstance(tree, dict | list):
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _containers(value)


def as_json(trees: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Encode trees as JSON; some are truncated or deeply nested."""
    texts = trees.map(lambda tree: json.dumps(tree, ensure_ascii=False))
    cut = st.tuples(texts, st.integers(0, 40)).map(lambda pair: pair[0][: -pair[1] or None])
    deep = texts.map(lambda text: text[:-1] + ', "deep": ' + "[" * 5000)
    return as_bytes(st.one_of(texts, texts, texts, texts, cut, deep))


@st.composite
def changed_safetensors(draw: st.DrawFn, valid: bytes) -> bytes:
    """Draw a safetensors file with a changed header, a wrong header length, or a changed body."""
    length = struct.unpack("<Q", valid[:8])[0]
    header = draw(as_json(changed_tree([json.loads(valid[8 : 8 + length])])))
    stated = draw(st.sampled_from((len(header), len(header), len(header), 0, 1, length, 2**40, 2**64 - 1)))
    body = valid[8 + length :]
    body = body[: draw(st.sampled_from((len(body), len(body), 0, 1, len(body) // 2)))]
    return struct.pack("<Q", stated) + header + body


@st.composite
def changed_bytes(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """Draw a valid file with up to four edits: bytes replaced, removed or doubled, or its end cut off."""
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, len(data)))
        end = begin + draw(st.sampled_from((0, 1, 1, 4, 100)))
        new = draw(st.one_of(st.binary(max_size=4), st.just(2 * data[begin:end]), st.just(b"\xff" * 8)))
        data = data[:begin] + new + data[end:]
    return data[: draw(st.sampled_from((None, None, None, len(data) // 2, -1)))]
