"""`Record`, the result of every reader."""

import dataclasses
import re

from etils import epath


@dataclasses.dataclass(frozen=True)
class Member:
    """A file inside an archive, such as an image in a tar.

    file:         the archive, local or a URL that `etils.epath` reads (gs://, s3://, hf://)
    offset, size: of its bytes in the archive
    """

    file: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Returns the bytes. Raises OSError if the archive cannot be opened or is truncated."""
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
    """One example, with its image on disk.

    image:   path of the image, or a member of an archive; None without an image
    others:  further images of a record with several, such as the frames of a video
    answer:  the target text: a caption, or the answer to the prompt
    prompt:  the record's prompt; None if the data have none (then one of `DataConfig.prompts` is used)
    input:   the text that the prompt refers to, as in `Sample`
    turns:   a conversation of several questions and answers, of which `prompt` and `answer` are the first
    problem: the reason why this record cannot be used; None if it can
    """

    name: str
    image: str | Member | None
    answer: str
    prompt: str | None = None
    input: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    problem: str | None = None
    others: tuple[str | Member, ...] = ()

    @property
    def images(self) -> tuple[str | Member, ...]:
        """All images, in order."""
        return () if self.image is None else (self.image, *self.others)


def clean_caption(caption: str, most_words: int = 50) -> str:
    """Returns a caption in lower case without punctuation, at most 50 words (blip_processors.py: pre_caption)."""
    caption = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    words = caption.split(" ")
    return " ".join(words[:most_words])
