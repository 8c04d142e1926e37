"""How shards on servers begin, and how large they are: what tells them apart from others under the same names.

A server's own marks (ETag, Last-Modified) are not compared: a copy, a second machine of the same server and the Hub's
caches have others for the same bytes.
"""

import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ldm_lab.data.contents import BEGINNING, OPENED
from ldm_lab.data.shard_urls import scheme_of
from ldm_lab.data.streams import location_on_hub
from ldm_lab.io.http import HTTPError, NoAnswer, Response

AT_ONCE = 16  # questions
SERVERS = ("http", "https", "hf")


def remote_contents(addresses: Sequence[str]) -> dict[str, str]:
    """Return address -> what tells its content apart, of at most 64, evenly spread, that a server gives.

    The whole file's size and the checksum of its beginning. Once a server says nothing, no more is asked for; what is
    left out is not known.
    """
    on_servers = [address for address in addresses if scheme_of(address) in SERVERS]
    asked = on_servers[:: max(1, -(-len(on_servers) // OPENED))]
    silent = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(asked, pool.map(lambda address: "" if silent.is_set() else _beginning(address, silent), asked)))


def _beginning(address: str, silent: threading.Event) -> str:
    """Return the size of a file and the checksum of its beginning; "" if it is out of reach, or its size not said."""
    try:
        url = location_on_hub(address) if scheme_of(address) == "hf" else address
        with Response(url, beginning=BEGINNING) as response:
            data = b""
            while len(data) < BEGINNING and (more := response.read(BEGINNING - len(data))):
                data += more
            return f"{response.total} {zlib.crc32(data)}" if response.start == 0 and response.total else ""
    except NoAnswer:
        silent.set()
    except (HTTPError, OSError):
        pass
    return ""
