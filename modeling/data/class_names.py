"""Names of classes as names of folders, and back."""

import unicodedata
from urllib.parse import quote, unquote

RESERVED_CHARACTERS = '/\\%*?[]<>:"|'


def encode_class(name: str) -> str:
    """Give the folder name of a class. Characters that paths or patterns cannot hold are percent-encoded.

    A leading dot, underscore or space is encoded too, and an empty name is "%". Example: "a/b" gives "a%2Fb".
    """
    encoded = ""
    for character in name:
        is_reserved = character in RESERVED_CHARACTERS or ord(character) < 32
        encoded += quote(character, safe="") if is_reserved else character
    if encoded.startswith((".", "_", " ")):
        return f"%{ord(encoded[0]):02X}{encoded[1:]}"
    return encoded or "%"


def decode_class(folder: str) -> str:
    """Give the class that encode_class named the folder after; any other folder is a class as it is."""
    name = "" if folder == "%" else unquote(folder)
    name = name if encode_class(name) == folder else folder
    return unicodedata.normalize("NFC", name)
