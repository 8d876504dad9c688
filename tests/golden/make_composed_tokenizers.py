"""Writes composed_tokenizers.json: small vocabularies, and the ids that transformers gives.

Run where tests/install_parity.sh has been:

    python -m tests.golden.make_composed_tokenizers

The vocabularies are trained here on made-up phrases, with the rules of the published ones: CLIP's
has every byte, alone and as the end of a word; BERT's has the letters that the phrases have.
"""

import json
import pathlib
import random
import tempfile

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

FILE = pathlib.Path(__file__).parent / "composed_tokenizers.json"

WORDS = """
a an the left right top bottom middle front back man woman boy girl dog cat horse zebra bus car
truck pizza bowl carrot broccoli table chair shirt hat hair umbrella red green blue yellow white
black orange purple small large tall short holding wearing sitting standing closest furthest behind
next to of in on with and who is person people person's kid's half second third 2nd 3rd #4 2 3 12
facing away camera corner partially hidden glass bottle ketchup sign saying "stop" semantic don't
we've they'll i'm you're grosse cafe naive 左 右 男 人
""".split()

PHRASES = """zebra top left
a pizza with a yellow sign on top of it
the broccoli closest to the ketchup bottle
3carrots in center with ice and greenn leaves
man in red, "STOP" sign
MAN IN RED
[semantic] hair
person's hat, the kid's 2nd hat
don't we've they'll I'm YOU'RE he'd
DON'T
12345 #4 4% $3.50 half-hidden e-mail@example.com
L'homme à gauche – très grand
der größte Hund rechts
Åse Å Å é é É naïve Café
İstanbul ıI ǅ ß ﬁ ﬀ
ｆｕｌｌ　ｗｉｄｔｈ
½ ① ㎏ ² ③
左边的男人
左 右
zebra左边dog
самый левый человек Ёлка
الرجل على اليسار
हिन्दी में
ไทยแลนด์
👩‍🚀 astronaut 🚀🚀
tab\tand\nnewline\r\nand more
a  b   c    d
   leading and trailing   
 non breaking  spaces 　 here 
zero​width ⁠joiner﻿ bom
control \x07 \x00 characters \x1f \x7f
replacement � here
.
…
'
''
'S
_under_score_ __
a/b\\c|d~e`f^g
!!!???...
<|startoftext|> dog <|endoftext|>
dog<|endoftext|>
<|ENDOFTEXT|> dog
<|endoftext
[CLS] dog [SEP]
[MASK]dog[MASK]
[cls] [Mask] dog
[PAD] [UNK]
##dog ## #
pneumonoultramicroscopicsilicovolcanoconiosis
supercalifragilisticexpialidociouslysupercalifragilisticexpialidociouslysupercalifragilisticexpialidocious
\t
<p>&amp; &lt;b&gt;
""".rstrip("\n").split("\n")  # fmt: skip


def tricky_texts(count: int) -> list[str]:
    """Words, white space, special tokens and characters from all over Unicode, mixed at random."""
    rng = random.Random(0)
    specials = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[SEP]", "[MASK]", "'s", "'ll"]
    spaces = [" ", "  ", "\t", "\n", " ", " ", "　", "​", ""]

    def anything() -> str:
        while True:
            character = chr(rng.choice([rng.randrange(0x20, 0x3000), rng.randrange(0x110000)]))
            if not 0xD800 <= ord(character) < 0xE000:  # half of a surrogate pair is no text
                return character

    def piece() -> str:
        kind = rng.random()
        if kind < 0.55:
            word = rng.choice(WORDS)
            return word.upper() if kind < 0.1 else word
        if kind < 0.7:
            return rng.choice(specials)
        return "".join(anything() for _ in range(rng.randrange(1, 4)))

    return [
        "".join(piece() + rng.choice(spaces) for _ in range(rng.randrange(1, 9)))
        for _ in range(count)
    ]


def phrases() -> list[str]:
    """What the vocabularies are trained on."""
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(2, 9))) for _ in range(2000)]


def clip_files() -> dict[str, str]:
    """vocab.json and merges.txt of some 250 joined pieces."""
    composed = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    composed.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(tokenizers.Regex(r"\s+"), behavior="removed")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    composed.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    trainer = trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False)
    composed.train_from_iterator(phrases(), trainer)
    merges = [tuple(pair) for pair in json.loads(composed.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [f"{letter}</w>" for letter in letters]
    pieces += list(dict.fromkeys("".join(pair) for pair in merges))
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
    }


def bert_files() -> dict[str, str]:
    """vocab.txt of some 300 pieces."""
    composed = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    composed.normalizer = normalizers.BertNormalizer()
    composed.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    composed.train_from_iterator([*phrases(), *PHRASES[:11]], trainer)
    vocabulary = composed.get_vocab()
    return {"vocab.txt": "".join(f"{piece}\n" for piece in sorted(vocabulary, key=vocabulary.get))}


def original_ids(kind: str, files: dict[str, str], texts: list[str]) -> list[list[int]]:
    """The ids of transformers' tokenizer with these files.

    Args:
      kind: "clip" or "bert".
    """
    from transformers import BertTokenizer, CLIPTokenizer

    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (pathlib.Path(directory) / name).write_text(content, encoding="utf-8")
        original = {"clip": CLIPTokenizer, "bert": BertTokenizer}[kind].from_pretrained(directory)
        return [original(text).input_ids for text in texts]


def main() -> None:
    cased = {"tokenizer_config.json": json.dumps({"do_lower_case": False})}
    files = {"clip": clip_files(), "bert": bert_files(), "bert_cased": bert_files() | cased}
    texts = [*PHRASES, *tricky_texts(150)]
    ids = {name: original_ids(name[:4], these, texts) for name, these in files.items()}
    content = {"made_by": "make_composed_tokenizers.py", "texts": texts}
    content |= {"files": files, "ids": ids}
    FILE.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    main()
