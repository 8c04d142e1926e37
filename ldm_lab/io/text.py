"""What is text: what UTF-8 can write."""


def is_text(written: str) -> bool:
    """Return whether a string is text: surrogates, which odd bytes of a command line become, are none."""
    return not any("\ud800" <= letter <= "\udfff" for letter in written)
