"""As much of a Ray head's jobs API as a launch asks, for tests that need no cluster behind it."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from aiohttp import web

from pipelines.launch.backend import Address

STOPPED = "STOPPED"


class JobsApi:
    """Its jobs, by name; a test changes them as it likes."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.url = ""

    def add(self, name: str, status: str, metadata: Mapping[str, str] = {}) -> None:
        """Put a job there."""
        self.jobs[name] = {
            "type": "SUBMISSION",
            "submission_id": name,
            "status": status,
            "entrypoint": "x",
            "metadata": dict(metadata or {}),
        }

    @contextmanager
    def address(self) -> Iterator[Address]:
        """Serve it, as a backend's way there does."""
        with self.served():
            yield Address(self.url)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"ray_version": ray.__version__, "version": "4"})

    async def package(self, request: web.Request) -> web.Response:
        return web.Response()

    async def listed(self, request: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = asked["submission_id"]
        if name in self.jobs:
            return web.Response(status=500, text=f"ValueError: {name} already exists")
        self.add(name, "RUNNING", asked["metadata"])
        return web.json_response({"job_id": name, "submission_id": name})

    async def one(self, request: web.Request) -> web.Response:
        return web.json_response(self.jobs[request.match_info["name"]])

    async def stop(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["name"]]["status"] = STOPPED
        return web.json_response({"stopped": True})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        line = web.WebSocketResponse()
        await line.prepare(request)
        await line.send_str("its output\n")
        while self.jobs[request.match_info["name"]]["status"] == "RUNNING":
            await asyncio.sleep(0.02)
        await line.close()
        return line

    @contextmanager
    def served(self) -> Iterator["JobsApi"]:
        """Serve it at a free port of this machine."""
        app = web.Application(client_max_size=2**30)
        app.add_routes(
            [
                web.get("/api/version", self.version),
                web.get("/api/packages/{tail:.*}", self.package),
                web.get("/api/jobs/", self.listed),
                web.post("/api/jobs/", self.submit),
                web.get("/api/jobs/{name}", self.one),
                web.post("/api/jobs/{name}/stop", self.stop),
                web.get("/api/jobs/{name}/logs/tail", self.tail),
            ]
        )
        loop, runner = asyncio.new_event_loop(), web.AppRunner(app)

        async def start() -> None:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

        def done(work: Coroutine[Any, Any, None]) -> None:
            asyncio.run_coroutine_threadsafe(work, loop).result(10)

        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        done(start())
        try:
            yield self
        finally:
            done(runner.cleanup())
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
