"""Trains the SentencePiece model that ships with the shapes.

    python -m data_pipelines.train_shapes_tokenizer

A unigram model, as BEiT-3's. Every word of the grammar becomes one piece; the letters stay pieces
too, so that a user's other words are spelled instead of lost. Case is folded. All words count
alike, so that the ids stay what they are when some kinds of phrases become more frequent.
"""

import contextlib
import io
import pathlib
import string
import tempfile

import sentencepiece

from data_pipelines.shapes import SHAPES_TOKENIZER, ShapesSource

PIECES = 96  # at most; as many as there are words and letters remain
COUNT = 100  # how often each word is shown: enough that it is kept whole
EXAMPLES = 200  # enough for every word to come up


def train(words: list[str]) -> bytes:
    """The serialised model; the same words in the same order give the same bytes."""
    # SentencePiece looks for pieces that several different words share; the seeds make it consider
    # whole words.
    seeds = [f"\u2581{word}\t{COUNT}\n" for word in words]
    seeds += [f"{letter}\t1\n" for letter in string.ascii_lowercase]
    # Only case is folded: the rules of a whole Unicode normalisation would take a hundred times the
    # space.
    folding = [f"{ord(letter):x}\t{ord(letter.lower()):x}\n" for letter in string.ascii_uppercase]
    model = io.BytesIO()
    # The model remembers the names of these files: short ones, so that the bytes do not depend on
    # the machine.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        pathlib.Path("seeds.tsv").write_text("".join(seeds), encoding="utf-8")
        pathlib.Path("case.tsv").write_text("".join(folding), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words * COUNT),
            model_writer=model,
            model_type="unigram",
            vocab_size=PIECES,
            hard_vocab_limit=False,
            seed_sentencepieces_file="seeds.tsv",
            normalization_rule_tsv="case.tsv",
            character_coverage=1.0,
            required_chars=string.ascii_lowercase,
            num_threads=1,
            # The order that XLM-RoBERTa's ids assume.
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    return model.getvalue()


def grammar_words() -> list[str]:
    """Every word of the first training examples, in alphabetical order."""
    examples = ShapesSource("train", length=EXAMPLES)
    return sorted({word for e in examples for phrase in e.phrases for word in phrase.split()})


if __name__ == "__main__":
    (SHAPES_TOKENIZER / "sentencepiece.bpe.model").write_bytes(train(grammar_words()))
