"""Names and texts as SQL writes them."""


def literal(text: str) -> str:
    """Return a text in single quotes."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str, quote: str = '"') -> str:
    """Return a column's name in quotes; Spark's are backticks."""
    return quote + name.replace(quote, quote + quote) + quote
