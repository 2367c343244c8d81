"""What an address is."""

from __future__ import annotations

import ipaddress


def is_ip(text: str) -> bool:
    """Tell an IP address, of either version, from a name that must be looked up."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
