"""The names of the senses, and the mapping from an input's name to its sense."""

SENSES = ("vision", "text", "audio", "depth", "thermal", "imu")


def sense_of(name: str) -> str:
    """Returns the sense that reads an input of this name: vision for image and video, else the sense of that name.

    Case is ignored. Raises ValueError listing the known names.
    """
    sense = {"image": "vision", "video": "vision"}.get(name.lower(), name.lower())
    if sense not in SENSES:
        raise ValueError(f"Unknown sense {name!r}; known are image, video, {', '.join(SENSES[1:])}.")
    return sense
