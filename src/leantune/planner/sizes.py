"""Memory sizes as a person types them."""

from __future__ import annotations

import re

from leantune.errors import UserError

_UNITS = {"B": 1} | {
    f"{letter}{middle}B": base ** (power + 1)
    for middle, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("KMGT")
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


def parse_size(text: str, key: str = "--memory") -> int:
    """`24GiB` → bytes. A unit must stand there: GB and GiB differ by 7 %.

    Args:
        text: A number and a unit, KB … TB (powers of 1000) or KiB … TiB (of 1024).
        key: What the size was given for, for the message.

    Raises:
        UserError: It is no such thing.
    """
    found = _SIZE.fullmatch(text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if re.fullmatch(r"\s*[0-9]+(?:\.[0-9]+)?\s*", text):
        raise UserError(f"{key} = {text!r}: a size needs a unit, write {text.strip()}GiB")
    if found is None or found[2].lower() not in units or float(found[1]) <= 0:
        raise UserError(
            f"{key} = {text!r}: must be a number with a unit, KiB, MiB, GiB, TiB or KB … TB: 24GiB"
        )
    return int(float(found[1]) * units[found[2].lower()])
