"""A stand-in for a Kubernetes API server: as much of it as kubectl asks for in a launch.

No real one can be had here (its binaries are in no package index that is reachable), so this is an
HTTP server with an object store: discovery, server version, reviews of access, and get, list,
create, patch and delete of objects. KubeRay's part, a head that becomes ready and pods that go with
their cluster, is played by what `GET` of a RayCluster says. Port forwarding is not in it.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

RESOURCES: dict[str, dict[str, str]] = {
    "v1": {
        "namespaces": "Namespace",
        "serviceaccounts": "ServiceAccount",
        "pods": "Pod",
        "secrets": "Secret",
    },
    "ray.io/v1": {"rayclusters": "RayCluster"},
}
"""By group and version: plural names and kinds."""


class KubeApi:
    """The server's objects, and what was asked of it."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        """By path."""
        self.requests: list[tuple[str, str]] = []
        self.kuberay = True
        self.forbidden: set[str] = set()
        """Verbs that are not allowed."""
        self.stuck: list[str] = []
        """Pods that do not go with their cluster."""

    def named(self, kind: str) -> dict[str, dict[str, Any]]:
        """All objects of a kind, by name."""
        return {
            each["metadata"]["name"]: each for each in self.objects.values() if each["kind"] == kind
        }

    def answer(self, method: str, url: str, body: Any) -> tuple[int, Any]:
        """Answer one request."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        self.requests.append((method, path))
        if path == "/version":
            return 200, {"major": "1", "minor": "32", "gitVersion": "v1.32.4"}
        if (found := self._discovery(path)) is not None:
            return 200, found
        if path.endswith("selfsubjectaccessreviews"):
            review = {"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1"}
            return 201, {**review, "spec": {}, "status": {"allowed": body not in self.forbidden}}
        if path.startswith("/openapi/v3"):
            return 200, _openapi(path.removeprefix("/openapi/v3").strip("/"))
        if method == "GET" and path.endswith("/pods"):
            return 200, {"kind": "PodList", "apiVersion": "v1", "items": self._pods(query)}
        return self._object(method, path, body)

    def _discovery(self, path: str) -> Any:
        groups = ["v1", *(["ray.io/v1"] if self.kuberay else [])]
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = [{"groupVersion": "ray.io/v1", "version": "v1"}]
            named = [{"name": "ray.io", "versions": versions, "preferredVersion": versions[0]}]
            named = named if self.kuberay else []
            review = [{"groupVersion": "authorization.k8s.io/v1", "version": "v1"}]
            named += [
                {
                    "name": "authorization.k8s.io",
                    "versions": review,
                    "preferredVersion": review[0],
                }
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": named}
        for group in groups:
            if path == ("/api/v1" if group == "v1" else f"/apis/{group}"):
                return {
                    "kind": "APIResourceList",
                    "groupVersion": group,
                    "resources": [
                        {
                            "name": name,
                            "singularName": kind.lower(),
                            "kind": kind,
                            "namespaced": kind != "Namespace",
                            "verbs": ["create", "get", "list", "patch", "delete"],
                        }
                        for name, kind in RESOURCES[group].items()
                    ],
                }
        if path == "/apis/authorization.k8s.io/v1":
            review = {"name": "selfsubjectaccessreviews", "kind": "SelfSubjectAccessReview"}
            return {
                "kind": "APIResourceList",
                "groupVersion": "authorization.k8s.io/v1",
                "resources": [{**review, "namespaced": False, "verbs": ["create"]}],
            }
        return None

    def _pods(self, query: dict[str, list[str]]) -> list[Any]:
        name = query["labelSelector"][0].partition("=")[2]
        names = [f"{name}-head"] if name in self.named("RayCluster") else self.stuck
        return [
            {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": name, "namespace": "droppos"}}
            for name in names
        ]

    def _object(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if method == "POST":
            self.objects[f"{path}/{body['metadata']['name']}"] = body
            return 201, body
        if path not in self.objects:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404}
            return 404, {**status, "reason": "NotFound", "message": f"{path} not found"}
        if method == "DELETE":
            del self.objects[path]
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        if method == "PATCH":
            self.objects[path] = {**self.objects[path], **body}
        found = self.objects[path]
        if found["kind"] == "RayCluster":
            ready = [{"type": "HeadPodReady", "status": "True"}]
            service = f"{found['metadata']['name']}-head-svc"
            return 200, {**found, "status": {"conditions": ready, "head": {"serviceName": service}}}
        return 200, found


def _verb(review: bytes) -> str:
    """Find the verb of a review of access, which kubectl sends as protobuf."""
    return next(
        verb
        for verb in ("create", "get", "patch", "delete")
        if bytes([0x12, len(verb)]) + verb.encode() in review
    )


def _openapi(group: str) -> Any:
    """Say that the server checks the fields of objects itself, so that kubectl need not."""
    paths = {("api/v1" if group == "v1" else f"apis/{group}"): group for group in RESOURCES}
    if not group:
        return {"paths": {path: {"serverRelativeURL": f"/openapi/v3/{path}"} for path in paths}}
    parts = paths[group].rpartition("/")
    parameters = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
    return {
        "openapi": "3.0.0",
        "info": {"title": group, "version": "v1"},
        "paths": {
            f"/{group}/{name}/{{name}}": {
                "patch": {
                    "parameters": parameters,
                    "x-kubernetes-group-version-kind": {
                        "group": parts[0],
                        "version": parts[2],
                        "kind": kind,
                    },
                    "responses": {},
                }
            }
            for name, kind in RESOURCES[paths[group]].items()
        },
    }


@contextmanager
def kube_api(folder: Path) -> Iterator[tuple[KubeApi, Path]]:
    """Serve; gives the API and a kubeconfig for it."""
    api = KubeApi()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            protobuf = self.headers.get("Content-Type", "").endswith("protobuf")
            body = _verb(sent) if protobuf else yaml.safe_load(sent or "null")
            code, answer = api.answer(self.command, self.path, body)
            text = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _serve  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = folder / "kubeconfig"
    url = f"http://127.0.0.1:{server.server_port}"
    config.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "team",
                "clusters": [{"name": "team", "cluster": {"server": url}}],
                "contexts": [{"name": "team", "context": {"cluster": "team", "user": "me"}}],
                "users": [{"name": "me", "user": {}}],
            }
        )
    )
    try:
        yield api, config
    finally:
        server.shutdown()
        server.server_close()
