"""Make room in PEFT's closed list of methods for methods that live outside PEFT.

`peft.utils.register_peft_method` is public, but it accepts only names that are members of the `PeftType`
enum, and transformers reads `peft_type.value`; a bare string is therefore not enough.
"""

from __future__ import annotations

from peft import PeftType


def add_peft_type(name: str) -> PeftType:
    """Add the member `name` to PEFT's `PeftType` enum. To be called once, before `register_peft_method`.

    Args:
        name: Upper-case name of the method, for example `"LAMDA"`. Saved adapters carry it as `peft_type`.

    Returns:
        The new member, equal to `name` and usable wherever PEFT and transformers expect a `PeftType`.

    Raises:
        RuntimeError: The name is taken, by PEFT itself or by another package.
    """
    if not name.isupper():
        raise ValueError(f"the name of a PEFT method is upper case, got {name!r}")
    if name in PeftType.__members__ or name in PeftType._value2member_map_:
        raise RuntimeError(
            f"PEFT has a method called {name} already (peft itself or another package registered it); "
            f"leantune cannot be used beside it in one process"
        )
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # The three places that enum looks at: lookup by name, by value, and iteration order.
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    return member
