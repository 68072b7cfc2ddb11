"""What COCO's own scorer says of generated captions; `python -m tests.evaluate.metrics.reference` writes it to
reference.json.

Needs the extra `captions` and Java for the tokens. The default tests read the file.
"""

import json
import random
import subprocess
from pathlib import Path

FILE = Path(__file__).with_name("reference.json")
_PIECES = (
    "a the dog cat man's woman's People don't isn't it's they're sitting on in of at table T-shirt well-lit 2 3 10 "
    "1990s black-and-white red/white and/or U.S. p.m. Mr. Smith etc. St. tennis-player's ski's skiers' dogs' cannot "
    "o'clock TV's 20-year-old $5 #1 1st 3:30 1,000 half-eaten 'STOP' \"STOP\" (left) [sic] & AT&T sign. what? wow!!! "
    "so... then-- - -- ; : , . ! ? 12' 5\" 100% x-ray mid- -style NYC's kid's, 'hello' b/w w/ one.Two mother/child "
    "Coca-Cola's ice-cream. 7-Eleven inc. jan. a.m., “quoted” it’s – — café ½ £5 gonna 'tis y'all {x} :) <b> 5+5"
).split()
_WORDS = "a dog cat man woman on the in sits runs red blue big table street with and two near".split()


def sentence(seed: int) -> str:
    """A caption full of what a tokenizer can get wrong."""
    draw = random.Random(seed)
    made = " ".join(draw.choices(_PIECES, k=draw.randint(4, 12)))
    made += draw.choice(["", ".", ".", "!", "?", "...", " .", ","])
    return made.upper() if draw.random() < 0.1 else made


def corpus(seed: int) -> tuple[list[str], list[list[str]]]:
    """(captions, references): 2 to 12 images with 1 to 5 references each, all of plain words; some captions equal one
    of them, some are empty."""
    draw = random.Random(seed)

    def say() -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(1, 12)))

    references = [[say() for _ in range(draw.randint(1, 5))] for _ in range(draw.randint(2, 12))]
    captions = []
    for each in references:
        words = draw.choice(each).split()
        some = [word for word in words if draw.random() < 0.8] + say().split()[: draw.randint(0, 3)]
        captions.append(draw.choice([" ".join(words), " ".join(some), " ".join(some), say(), ""]))
    return captions, references


def java_tokens(captions: list[str]) -> list[list[str]]:
    """What PTBTokenizer makes of them, and what coco-caption then leaves.

    Between them stand lines of one plain word: the program looks past the end of a line to see whether a period after
    a letter ends a sentence.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    done = subprocess.run(
        ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines",
         "-lowerCase"], input="\nand\n".join(captions).encode(), capture_output=True, check=True)
    lines = done.stdout.decode().split("\n")[: 2 * len(captions) : 2]
    return [[word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS] for line in lines]


def published_scores(captions: list[str], references: list[list[str]]) -> dict:
    """{"BLEU": four figures, "ROUGE-L": of each caption, "CIDEr-D": of each caption} from pycocoevalcap's classes."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    right, said = dict(enumerate(references)), {number: [caption] for number, caption in enumerate(captions)}
    bleu, _ = Bleu(4).compute_score(right, said, verbose=0)
    return {"BLEU": bleu, "ROUGE-L": [float(score) for score in Rouge().compute_score(right, said)[1]],
            "CIDEr-D": [float(score) for score in Cider().compute_score(right, said)[1]]}


if __name__ == "__main__":
    sentences = [sentence(seed) for seed in range(400)]
    found = {"tokens": dict(zip(sentences, java_tokens(sentences), strict=True)),
             "scores": [published_scores(*corpus(seed)) for seed in range(60)]}
    FILE.write_text(json.dumps(found, ensure_ascii=False, indent=0, sort_keys=True) + "\n", encoding="utf-8")
