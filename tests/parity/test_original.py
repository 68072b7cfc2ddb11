"""How the original reads answers out of generated ids."""

import pytest

from mmjax.tokenizer import Tokenizer
from tests.convert.released import CKPT
from tests.parity.original import answer_of_chat, answer_of_generate


@pytest.mark.parametrize(("text", "generate", "chat"), [
    (" A dog. ", "A dog.", "A dog."),
    ("A dog.### Human: more", "A dog.### Human: more", "A dog."),
    ("[INST] a [/INST] b [/INST] A dog.", "A dog.", "[INST] a [/INST] b [/INST] A dog."),
    ("Human: x Assistant: A dog.", "Human: x Assistant: A dog.", "A dog."),
    ("", "", ""),
])
def test_answers(text, generate, chat):
    tokenizer = Tokenizer.from_folder(CKPT / "llama_hf")
    ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
    assert answer_of_generate(ids, tokenizer) == generate
    assert answer_of_chat(ids, tokenizer) == chat


def test_generate_drops_a_first_id_of_zero_only():
    class Plain:
        def decode(self, ids):
            return " ".join(map(str, ids))

    assert answer_of_generate([0, 5, 0], Plain()) == "5 0"
    assert answer_of_generate([1, 5], Plain()) == "1 5"
    assert answer_of_generate([], Plain()) == ""


def test_special_pieces_spelt_out_end_an_answer():
    class Spelt:
        def decode(self, ids):
            return "<s>A dog.</s> and more"

    assert answer_of_generate([5], Spelt()) == "A dog."
