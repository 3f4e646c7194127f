"""A CONNECT proxy as a process: proxy.py PORT."""

from __future__ import annotations

import asyncio
import sys

from site_proxy import SiteProxy


async def main(port: int) -> None:
    proxy = SiteProxy("http")
    proxy.host, proxy.port = "0.0.0.0", port
    async with proxy:
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
