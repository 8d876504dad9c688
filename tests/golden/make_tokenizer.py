"""Writes tokenizer_parity.json and tokenizer_parity.model: what transformers' slow tokenizer gives.

Run in an environment of its own, since the project's own needs no transformers:

    pip install transformers==4.57.6 sentencepiece==0.2.3 protobuf
    python tests/golden/make_tokenizer.py

The SentencePiece model is trained here on made-up phrases with the settings that BEiT-3's shares
with every multilingual model (unigram, `nmt_nfkc`), so it has the same rules in a small vocabulary.
"""

import io
import json
import pathlib
import random
import tempfile

import sentencepiece
from transformers import XLMRobertaTokenizer

GOLDEN = pathlib.Path(__file__).parent

WORDS = """
a an the left right top bottom middle front back man woman boy girl dog cat horse zebra bus car
truck pizza bowl carrot broccoli table chair shirt hat hair umbrella red green blue yellow white
black orange purple small large tall short holding wearing sitting standing closest furthest behind
next to of in on with and who is person people person's kid's half second third 2nd 3rd #4 2 3 12
facing away camera corner partially hidden glass bottle ketchup sign saying "stop" semantic mask pad
""".split()

PHRASES = """zebra top left
a pizza with a yellow sign on top of it
the broccoli closest to the ketchup bottle
bus going to south common
3carrots in center with ice and greenn leaves
[semantic] hair
[semantic]hair
hair [semantic]
  [semantic]   hair  [semantic] arm
[semantic][semantic] arm
[ semantic ] hair
[Semantic] hair
[semantic
the [semantic]'s hat
<mask> dog
dog <mask>
dog   <mask>   cat
a<mask>b
<s> dog </s>
<s>dog</s>
dog<pad><pad>
<unk> cat <unk>
<s
</s
<<mask>>
<MASK>
<mask
man in red, "STOP" sign
MAN IN RED
L'homme à gauche – très grand
der größte Hund rechts
ｆｕｌｌ　ｗｉｄｔｈ
ﬁsh ½ ① ㎏ Å Å
é é
左边的男人
самый левый человек
الرجل على اليسار
👩‍🚀 astronaut 🚀
tab\tand\nnewline\r\nand more
 non breaking  spaces 　 here 
zero​width ⁠joiner﻿ bom
▁underline ▁▁ blocks
control \x07 \x00 characters \x1f
a  b   c    d
   leading and trailing   
\t
.
…
'
ab[unk]cd <extra_id_0> [MASK] [CLS]
<strip> both sides <strip>
left   <strip>   right
<strip><mask>  <strip>  [semantic]  <mask>
""".rstrip("\n").split("\n")  # fmt: skip


def tricky_texts(count: int) -> list[str]:
    """Words, white space, special tokens and characters from all over Unicode, mixed at random."""
    rng = random.Random(0)
    specials = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "[semantic]", "<strip>"]
    spaces = [" ", "  ", "\t", "\n", " ", " ", "　", "​", ""]

    def anything() -> str:
        while True:
            character = chr(rng.choice([rng.randrange(0x20, 0x3000), rng.randrange(0x110000)]))
            if not 0xD800 <= ord(character) < 0xE000:  # half of a surrogate pair is no text
                return character

    def piece() -> str:
        kind = rng.random()
        if kind < 0.55:
            return rng.choice(WORDS)
        if kind < 0.75:
            return rng.choice(specials)
        return "".join(anything() for _ in range(rng.randrange(1, 4)))

    return [
        "".join(piece() + rng.choice(spaces) for _ in range(rng.randrange(1, 9)))
        for _ in range(count)
    ]


def train_model() -> bytes:
    """A unigram model of some 300 pieces, from phrases of the words above."""
    rng = random.Random(1)
    phrases = [" ".join(rng.choices(WORDS, k=rng.randrange(2, 9))) for _ in range(3000)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(phrases),
        model_writer=model,
        model_type="unigram",
        vocab_size=300,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def entry(content: str, lstrip: bool = False, rstrip: bool = False, special: bool = True) -> dict:
    """One token as tokenizer_config.json spells it."""
    return {
        "content": content,
        "lstrip": lstrip,
        "rstrip": rstrip,
        "normalized": False,
        "single_word": False,
        "special": special,
    }


def main() -> None:
    model = train_model()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    texts = [text for text in [*PHRASES, *tricky_texts(300)] if text.strip()]
    # As evf-sam, as evf-sam-multitask, and as newer versions of transformers save a tokenizer.
    files = {
        "plain": {},
        "added": {"added_tokens.json": {"[semantic]": pieces + 2}},
        "decoder": {
            "tokenizer_config.json": {
                "added_tokens_decoder": {
                    "0": entry("<s>"),
                    "1": entry("<pad>"),
                    "2": entry("</s>"),
                    "3": entry("<unk>"),
                    str(pieces + 1): entry("<mask>", lstrip=True),
                    str(pieces + 2): entry("[semantic]", special=False),
                    str(pieces + 3): entry("<strip>", lstrip=True, rstrip=True),
                }
            }
        },
    }
    ids = {}
    for name, extra in files.items():
        with tempfile.TemporaryDirectory() as directory:
            (pathlib.Path(directory) / "sentencepiece.bpe.model").write_bytes(model)
            for file, content in extra.items():
                (pathlib.Path(directory) / file).write_text(json.dumps(content))
            tokenizer = XLMRobertaTokenizer.from_pretrained(directory)
            ids[name] = [tokenizer(text).input_ids for text in texts]
    (GOLDEN / "tokenizer_parity.model").write_bytes(model)
    content = {"made_by": "make_tokenizer.py", "files": files, "texts": texts, "ids": ids}
    (GOLDEN / "tokenizer_parity.json").write_text(json.dumps(content, separators=(",", ":")))


if __name__ == "__main__":
    main()
