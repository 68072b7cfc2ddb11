"""The senses that a model may have, and which of them reads an input."""

SENSES = ("vision", "text", "audio", "depth", "thermal", "imu")


def sense_of(name: str) -> str:
    """The sense that reads an input of this name: `Image` and `Video` are vision's, the others have the sense's name.

    Raises ValueError naming the ones there are.
    """
    sense = {"image": "vision", "video": "vision"}.get(name.lower(), name.lower())
    if sense not in SENSES:
        raise ValueError(f"No sense is called {name!r}; there are image, video, {', '.join(SENSES[1:])}.")
    return sense
