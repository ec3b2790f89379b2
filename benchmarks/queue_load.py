"""Posts requests over many connections, and prints how many were answered and how fast.

python -P benchmarks/queue_load.py PORT CONNECTIONS SECONDS
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter


async def post_on(port: int, until: float, number: int, took: list[float], statuses: Counter[int]) -> None:
    """Post on one connection until the time is over; each body is another job."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    n = 0
    while time.perf_counter() < until:
        n += 1
        body = json.dumps(
            {"model_name": f"owner/name-{number}-{n}-{time.time_ns()}", "batch_size": 1, "sequence_length": 512}
        ).encode()
        head = (
            "POST /api/request HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        begin = time.perf_counter()
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in answer.split(b"\r\n")[1:] if b": " in line)
        await reader.readexactly(int(headers[b"content-length"]))
        took.append(time.perf_counter() - begin)
        statuses[int(answer.split(b" ", 2)[1])] += 1
        if headers.get(b"connection") == b"close":
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()


async def main() -> None:
    port, connections, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    took: list[float] = []
    statuses: Counter[int] = Counter()
    until = time.perf_counter() + seconds
    await asyncio.gather(*(post_on(port, until, n, took, statuses) for n in range(connections)))
    took.sort()
    print(
        json.dumps(
            {
                "posts_per_s": round(len(took) / seconds, 1),
                "p50_ms": round(1000 * took[len(took) // 2], 1),
                "p99_ms": round(1000 * took[int(len(took) * 0.99)], 1),
                "others": sum(count for status, count in statuses.items() if status != 202),
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main())
