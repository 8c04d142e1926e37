"""The door: who has the password comes in, and who has not waits longer each time."""

import asyncio
import hmac
import ipaddress
import logging
from contextvars import ContextVar
from dataclasses import dataclass, field

FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0  # seconds before a wrong password is answered; doubled by each
MOST_LOGINS = 16  # of one address, that wait for their turn
MOST_ADDRESSES = 1024  # that are remembered
NETWORK = 64  # bits of an IPv6 address that count: whoever has one has all that begin so
caller: ContextVar[str] = ContextVar("caller", default="")  # the address that the request at hand comes from
logger = logging.getLogger(__name__)


@dataclass
class _Address:
    """What is known of those who come from one address.

    Attributes:
        wrong: passwords in a row.
        waiting: logins, the one that is looked at included.
        turn: of the one that is looked at.
    """

    wrong: int = 0
    waiting: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Door:
    """Asks for a password.

    Of each address one login at a time is looked at, and each wrong one in a row takes longer than the last; those of
    other addresses are not in its way.
    """

    def __init__(self, password: str) -> None:
        self._wanted = password.encode()
        self._addresses: dict[str, _Address] = {}

    async def is_right(self, _: str, given: str) -> bool:
        """Return whether a password is right, of whatever user. Raises HTTPException for too many at once."""
        from starlette.exceptions import HTTPException

        place = network(caller.get())
        known = self._known(place)
        if known is None or known.waiting >= MOST_LOGINS:
            raise HTTPException(429, "too many logins at once; try again later")
        known.waiting += 1
        try:
            async with known.turn:
                if hmac.compare_digest(given.encode(errors="replace"), self._wanted):
                    known.wrong = 0
                    return True
                known.wrong += 1
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(known.wrong - 1, 30))
                said = "a login with a wrong password from %s, the %d. in a row; answered in %g s"
                logger.warning(said, place or "an unknown address", known.wrong, delay)
                await asyncio.sleep(delay)
                return False
        finally:
            known.waiting -= 1

    def _known(self, place: str) -> _Address | None:
        """Return what is known of an address; the one that came first is forgotten for it. None: all are waiting."""
        known = self._addresses.pop(place, None)
        if known is None and len(self._addresses) >= MOST_ADDRESSES:
            idle = next((name for name, its in self._addresses.items() if not its.waiting), None)
            if idle is None:
                return None
            del self._addresses[idle]
        return self._addresses.setdefault(place, known or _Address())


def network(address: str) -> str:
    """Return what an address counts as: an IPv4 address itself, an IPv6 one the network that it is of."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # of a socket that has none, or whatever a server in front says
        return address[:100]
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found), NETWORK), strict=False))
