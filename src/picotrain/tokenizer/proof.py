"""Texts that an encoder has to give back to the byte, twice alike, before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from picotrain.tokenizer.artifact import BOS

# The places where split patterns and merges are easily got wrong.
SAMPLE = (
    "The quick brown fox can't jump; it'll WALK, they'RE told. I'd've said: don't!",
    'def f(x: int) -> dict[str, float]:\n\t"""Doc."""\n    return {\'a\': x ** 2, "b": 0x1F_FF, \'c\': 1e-10}  # done\r\n\r\n',
    "   leading, trailing   \n\n\n \t mixed\u00a0spaces\u2003and\u3000more \r\n \r \n  x\n",
    "1 12 123 1234 12345 3.14159 1,000,000 ١٢٣ ४५६ ½ Ⅷ ²³",
    "naïve café Straße ÅÄÖ ñandú œuvre İstanbul ſ K — “quotes” … €100 £5",
    "Съешь же ещё этих мягких булок. Ξεσκεπάζω την ψυχοφθόρα. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया",
    "今日は世界。こんにちは、元気ですか？ 你好，世界！ 안녕하세요 สวัสดีชาวโลก",
    "emoji: 🙂👩‍👩‍👧‍👦🏳️‍🌈🇪🇺 e\u0301 a\u0308 \u200b\ufeff \x00\x01\x7f \U0010ffff",
    f"{BOS} text{BOS}{BOS}more <|bos |> <|endoftext|> <bos>",
    "https://example.org/a_b?c=d&e=%20#f ~/.x/../y $HOME \\n <!-- --> <div class='z'>&amp;</div> " + "=" * 80 + " " * 70 + "a" * 300,
    "'s'S 'll'LL 't 've!!!???\n...---___+++\n'",
    "",
)


def _every_byte() -> str:
    """A text with every character of one byte or two, and of longer ones enough that each byte which UTF-8 has is there."""
    longer = [*range(0x800, 0xD800, 1009), *range(0xE000, 0x10000, 1009), *range(0x10000, 0x110000, 40_009)]
    return "".join(map(chr, (*range(0x800), *longer)))


# Long enough to meet a limit on tokens.
LONG = _every_byte() + "\n".join(SAMPLE) * 3

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


def texts(specials: Sequence[str]) -> list[str]:
    """What is encoded in a proof: the sample, a long text, and the names of special tokens."""
    return [*SAMPLE, LONG, " ".join(specials), "".join(specials)]


def lost(encode: Encode, texts: Sequence[str], table: Sequence[bytes]) -> str:
    """Why an encoder cannot be used, "" for no reason: ids, looked up in `table`, that are not the text's bytes, or not those of before."""
    first = encode(texts)
    for text, ids in zip(texts, first, strict=True):
        if (found := b"".join([table[id] for id in ids])) != (wanted := text.encode()):
            at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
            return f"{_shown(wanted, at)} comes back as {_shown(found, at)}"
    if [list(ids) for ids in encode(texts)] != [list(ids) for ids in first]:
        return "the same text is encoded in different ways from call to call"
    return ""


def differing(encode: Encode, reference: Encode, texts: Sequence[str]) -> str | None:
    """The first text that two encoders encode differently."""
    pairs = zip(texts, encode(texts), reference(texts), strict=True)
    return next((text for text, ids, right in pairs if list(ids) != list(right)), None)


def _shown(text: bytes, at: int) -> str:
    """Some of a text around a place."""
    return repr(text[max(0, at - 10) : at + 20].decode(errors="replace"))
