"""What every layout is read into."""

import dataclasses
import re

from etils import epath


@dataclasses.dataclass(frozen=True)
class Member:
    """A file that lies inside another one, such as an image in a tar.

    file:         the archive, local or of a kind that `etils.epath` reads (gs://, s3://, hf://)
    offset, size: where its bytes are
    """

    file: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. Raises OSError if the archive cannot be opened, or ends before them."""
        with epath.Path(self.file).open("rb") as archive:
            archive.seek(self.offset)
            content = archive.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self} cannot be read: the archive ends after {len(content)} of them")
        return content

    def __str__(self) -> str:
        return f"{self.file}, {self.size} bytes at {self.offset}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One example, its image still on disk.

    image:   path of the image, or a member of an archive; None without one
    answer:  what is learnt: a caption, or the answer to the prompt
    prompt:  the record's own; None where the data have none (`DataConfig.prompts` says what is asked)
    input:   what the prompt is about, as in `Sample`
    turns:   a conversation of several questions and answers; `prompt` and `answer` are then the first of them
    problem: why there is nothing to learn from this record; None where there is
    """

    name: str
    image: str | Member | None
    answer: str
    prompt: str | None = None
    input: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    problem: str | None = None


def clean_caption(caption: str, most_words: int = 50) -> str:
    """Stage-1 cleaning: lower case, punctuation to spaces, at most 50 words (blip_processors.py: pre_caption)."""
    caption = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    words = caption.split(" ")
    return " ".join(words[:most_words])
